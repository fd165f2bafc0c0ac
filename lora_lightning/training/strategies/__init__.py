"""Training over several processes: `base` is all that the module knows, `fsdp2/` the one implementation.

DDP is Lightning's own. Imports `checkpoints` and `distributed`.
"""
