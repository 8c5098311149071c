"""Reports as web pages, each in a single file.  Needs the extra: pip install 'requant_onnx[report]'."""
