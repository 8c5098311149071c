"""Everything that uses ONNX Runtime: sessions, running a model as a whole or node by node, and the treatment of each weight."""
