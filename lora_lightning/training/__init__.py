"""Training on Lightning: read `module.py` first, then `trainer.py`.

`module` adapts a backbone and trains it on a task; `callbacks/` watch, `checkpoints/` keep and `strategies/` shard it,
`activations/` trade its time for memory, `tracking/` logs it. Imports lora, data, tasks, analysis, export and reports.
"""
