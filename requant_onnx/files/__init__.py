"""ONNX on disk: load and check, external data, the wire format, and writing whole or not at all."""
