"""Reports as web pages, whole in one file each.  Needs the extra: pip install 'requant_onnx[report]'."""
