"""What a training step does with activations: blocks that are computed again, tensors that wait elsewhere, compiling.

Imports lora.
"""
