"""The method in NumPy: level tables, ranges, the exact error curve, the search, rounding.  No ONNX here."""
