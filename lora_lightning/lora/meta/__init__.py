"""Models larger than memory: built on the meta device, filled from files, merged on disk.

Imports `lora.inject` and `lora.formats`.
"""
