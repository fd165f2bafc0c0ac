"""W0 as data: its tensors, fingerprint, dtypes, quantization, ties and spectrum.

Imports `lora.errors` and torch; knows nothing of adapters but the names of their tensors.
"""
