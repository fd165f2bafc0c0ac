"""PEFT's adapter files, `adapter_config.json` and `adapter_model.safetensors`: read and written bit for bit.

Imports `lora.inject` and the formats beside it.
"""
