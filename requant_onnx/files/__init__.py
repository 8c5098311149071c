"""ONNX on disk: load and check, external data, the wire format, and writing files completely or not at all."""
