"""Samplers, resumable loaders, packing and padding."""
