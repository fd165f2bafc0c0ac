"""Files: PEFT's adapters, loralib's checkpoints, what vLLM takes, provenance, tensor files, atomic folders.

Imports `lora.inject` and `lora.frozen`.
"""
