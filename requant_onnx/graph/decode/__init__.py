"""Decodes of weights: the forms of a weight, the packing of its codes, and the nodes that decode them."""
