"""What a training step does with activations: blocks that are computed again, tensors that wait elsewhere, compiling.

`blocks` finds the repeated blocks of any backbone. Imports lora.
"""
