"""The structure of a model: operators, constants, weights and layers; onnx to write, onnx_graphsurgeon to navigate."""
