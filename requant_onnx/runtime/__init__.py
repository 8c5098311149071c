"""ONNX Runtime, used here only: sessions, running a model on its inputs or node by node, and what becomes of each weight."""
