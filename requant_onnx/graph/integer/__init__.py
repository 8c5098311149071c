"""The int8 form: which nodes run on integers, and the QuantizeLinear and DequantizeLinear nodes around them."""
