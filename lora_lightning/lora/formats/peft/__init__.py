"""PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors`, read and written to the bit.

Imports `lora.inject` and the formats beside it.
"""
