"""W0 as data: its tensors, fingerprint, dtypes, quantization, ties and spectrum, by the names of the plain model.

Imports `lora.layers`, to tell the adapter's tensors from W0's; writes into W0 only to change its dtype.
"""
