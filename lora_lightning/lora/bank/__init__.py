"""Several adapters over one W0: stored, switched, combined, mixed within a batch, or at another strength.

Imports `lora.inject`, `lora.layers` and `lora.formats`.
"""
