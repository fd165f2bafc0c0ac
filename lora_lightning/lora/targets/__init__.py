"""What a config selects in a model, and why: patterns, presets, fused projections, token rows, bypasses.

Imports `lora.layers` and `lora.frozen`; changes nothing in the model.
"""
