"""FSDP2: W0, the adapter and its optimizer sharded over the processes by torch's `fully_shard`.

`strategy` is Lightning's strategy, which keeps the processes in step; `wrapping` shards a backbone, `checkpointing`
writes and reads one file. Imports `strategies.base` and `checkpoints`.
"""
