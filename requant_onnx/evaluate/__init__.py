"""Comparisons of two models, on images or weight by weight, and of many recipes."""
