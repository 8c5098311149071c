"""The structure of a model: operators, constants, weights and layers; written with onnx, navigated with onnx_graphsurgeon."""
