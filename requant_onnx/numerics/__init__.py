"""The method in NumPy, independent of ONNX: level tables, ranges, the exact error curve, the search, rounding."""
