"""Models larger than memory: build them on the meta device, fill them from files, merge on disk.

Imports `lora.inject` and `lora.formats`.
"""
