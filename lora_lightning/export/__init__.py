"""Adapters and merged models as files, and the proof that both compute the same.

`export` takes an adapted backbone, its task and W0's fingerprint; `merge_on_disk` works from directory to directory.
It imports lora, backbones and tasks; training calls it.
"""
