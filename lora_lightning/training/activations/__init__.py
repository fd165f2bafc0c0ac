"""Options of a training step's forward: activation checkpointing, offloading, compilation.

Imports lora.
"""
