"""Rewrites before a conversion, one in each module: what they return answers as the model given does."""
