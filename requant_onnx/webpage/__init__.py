"""Reports as web pages, each a single file.  Needs the extra: pip install 'requant_onnx[report]'."""
