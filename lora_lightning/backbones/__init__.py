"""Models by name: the Hugging Face hub, timm, torchvision, GGUF files.

Imports `lora` only.
"""
