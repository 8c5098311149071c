"""Rewrites before a conversion, one in each module, which do not change the answers of the model."""
