"""The rank that an adapter uses, section 7 of the paper (arXiv 2106.09685), and how far it moved its model.

`adapters` reads the factors, `base_weights` W0 beside them, `measures` and `similarity` compute, `truncation` writes a
smaller adapter; `drift` runs the model beside its base on what `drift_inputs` reads, `strength` compares strengths of
the update; `tables` and `plots` show it. It imports lora, data, tasks and reports; training's telemetry calls it.
"""
