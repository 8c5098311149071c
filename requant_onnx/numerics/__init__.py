"""The method in NumPy and Numba: level tables, ranges, the exact error curve, the search, rounding.  No ONNX here."""
