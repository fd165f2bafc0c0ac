"""Which processes read batches of their own: those of one tensor-parallel group read the same."""

from __future__ import annotations

from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy


class Replica(NamedTuple):
    """A process's place among those that read."""

    replicas: int
    """How many there are: a group of processes that read the same is one."""
    number: int
    """Which of them this is, from 0."""
    speaks: bool
    """Whether this process is the first of its group, which counts for all of it."""


def replica(trainer: Trainer) -> Replica:
    """Of this process."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return Replica(trainer.world_size, trainer.global_rank, True)
    mesh = trainer.strategy.device_mesh
    own = trainer.strategy.distributed_sampler_kwargs
    return Replica(own["num_replicas"], own["rank"], mesh.get_local_rank("tensor_parallel") == 0)
