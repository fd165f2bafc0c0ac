"""FSDP2: W0, the adapter and its optimizer sharded over the processes by torch's `fully_shard`.

`strategy` is Lightning's strategy; `wrapping` shards a backbone, `stepping` keeps the processes in step,
`checkpointing` writes and reads one file. Imports `strategies.base` and `checkpoints`.
"""
