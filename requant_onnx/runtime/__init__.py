"""Everything that uses ONNX Runtime: sessions, running a model whole or node by node, and what happens to each weight."""
