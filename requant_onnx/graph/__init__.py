"""Reading and rewriting ONNX graphs: onnx to write, onnx_graphsurgeon to navigate.  No ONNX Runtime here."""
