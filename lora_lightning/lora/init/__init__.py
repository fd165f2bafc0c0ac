"""Inits of A and B: at random, from W0, from data, or from another adapter.

Imports `lora.frozen` and `lora.layers`.
"""
