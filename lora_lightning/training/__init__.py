"""Training on Lightning: read `module.py` first, then `trainer.py`.

`module` adapts a backbone and trains it on a task. `callbacks/` observe a fit, `checkpoints/` save and resume it,
`strategies/` shard it, `activations` trade time for memory, `tracking/` logs. Imports lora, data, tasks, analysis,
export and reports.
"""
