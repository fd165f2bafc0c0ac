"""Several adapters over one W0: stored and switched, or at another strength.

Imports `lora.inject`, `lora.layers` and `lora.formats`.
"""
