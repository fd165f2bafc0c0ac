"""What trains in full beside A and B: copies of modules, biases, token rows; and norms that stay frozen.

Imports `lora.layers.class_swap`.
"""
