"""Training over several processes: the module knows only `base`; `fsdp2` implements it.

DDP is Lightning's. Imports `checkpoints` and `initialization`.
"""
