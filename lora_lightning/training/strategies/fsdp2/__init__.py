"""FSDP2: W0, the adapter and its optimizer sharded over the processes by torch's `fully_shard`.

`strategy` is what Lightning is given; `wrapping` shards a backbone, `stepping` keeps the processes in step,
`checkpointing` writes and reads one file. Imports `strategies.base` and `checkpoints`.
"""
