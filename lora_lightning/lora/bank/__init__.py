"""Several adapters over one W0: kept, switched, combined, and mixed within a batch.

Imports `lora.inject`, `lora.layers` and `lora.formats`.
"""
