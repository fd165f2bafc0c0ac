"""Samplers, loaders and packing; a resumed loader goes on where it stopped."""
