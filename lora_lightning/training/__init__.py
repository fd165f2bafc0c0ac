"""Training on Lightning: read `module.py` first, then `trainer.py`.

`module` adapts a backbone and trains it on a task; `callbacks/` watch it, `checkpoints/` keep it, `strategies/` shard it,
`activations/` trade its time for memory, `tracking/` logs it. Imports lora, data, tasks, analysis, export and reports.
"""
