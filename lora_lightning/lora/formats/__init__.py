"""Files: PEFT's adapters, loralib's checkpoints, provenance, tensor files, atomic folders.

Imports `lora.inject` and `lora.frozen`.
"""
