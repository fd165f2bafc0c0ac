"""Several adapters over one W0: kept, switched, combined, mixed within a batch, or of another strength.

Imports `lora.inject`, `lora.layers` and `lora.formats`.
"""
