"""FSDP2: W0, the adapter and its optimizer sharded over the processes by torch's `fully_shard`.

`strategy` is Lightning's strategy, which keeps the processes in step and writes and reads one file; `wrapping` shards
a backbone. Imports `strategies.base` and `checkpoints`.
"""
