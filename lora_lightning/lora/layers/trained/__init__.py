"""What trains in full beside A and B: copies of modules, biases, token rows; and norms with frozen statistics.

Imports `lora.layers.class_swap`.
"""
