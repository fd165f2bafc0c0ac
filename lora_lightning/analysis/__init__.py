"""The rank that an adapter uses, section 7 of the paper (arXiv 2106.09685), and how far it moved its model.

`adapters` reads the factors, `base_weights` W0, `spectra`, `measures` and `similarity` compute, `truncation` writes a
smaller adapter; `drift` compares the model with its base on the texts of `drift_inputs`, `strength` compares strengths
of the update; `tables` and `plots` show the results. It imports lora, data, tasks and reports; training's telemetry
calls it.
"""
