"""Activations: recomputed, offloaded, compiled."""
