"""What a model means: its operators, constants, weights and layers; onnx to write, onnx_graphsurgeon to navigate."""
