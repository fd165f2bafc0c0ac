"""Checkpoints: `adapter_state` says what one holds, `file_io` writes and reads it, `run_folder` finds it.

`model_checkpoint` decides when; `resume` makes a resumed fit the uninterrupted one, with `loop_state`
(Lightning's loops). Imports lora, data and `tracking.loggers`.
"""
