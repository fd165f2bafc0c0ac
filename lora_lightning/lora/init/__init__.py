"""How A and B begin: at random, from W0, or from data.

Imports `lora.frozen` and `lora.layers`.
"""
