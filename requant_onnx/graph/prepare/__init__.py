"""Rewrites before a conversion, one per module, which do not change the results of the model."""
