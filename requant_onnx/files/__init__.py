"""ONNX files on disk: loading and checking, external data, the wire format, and atomic writes."""
