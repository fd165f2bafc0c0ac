"""Adapters and merged models as files, and the proof that both compute the same."""
