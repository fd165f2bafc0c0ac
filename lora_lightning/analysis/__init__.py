"""The rank that an adapter uses: section 7 of the paper (arXiv 2106.09685) for any adapter, ours or PEFT's.

`adapters` reads the factors, `base_weights` W0 beside them, `measures` and `similarity` compute, `truncation` writes a
smaller adapter, `tables` and `plots` show it. It imports lora and reports; the rank telemetry of training calls it.
"""
