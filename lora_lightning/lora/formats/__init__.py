"""Files: PEFT's adapters, loralib's checkpoints, adapters for vLLM, provenance, tensor files, atomic folders.

Imports `lora.inject` and `lora.frozen`.
"""
