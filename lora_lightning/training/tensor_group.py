"""The processes of one tensor-parallel group as one reader: they see the same batches and draw the same numbers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lora_lightning.training.checkpoints.rng_state import random_state, set_random_state

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


_LOG = logging.getLogger("torch.distributed.tensor._redistribute")


def _is_no_advice(record: logging.LogRecord) -> bool:
    """torch tells how sums over both dimensions of a mesh could be one: those of a few norms."""
    return not record.getMessage().startswith("While redistributing")


def join(module: LoRAModule, mesh: DeviceMesh) -> None:
    """Draw as the group's first process does, and count each batch once in the task's metrics."""
    share_random_state(mesh)
    _LOG.addFilter(_is_no_advice)
    gather = _GatherIn(mesh["data_parallel"].get_group())
    for metric in module.task.modules():
        if isinstance(metric, Metric):
            metric.dist_sync_fn = gather


class _GatherIn:
    """One state of each process that reads batches of its own. Copies of a metric, for further sets, share it."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, result: Tensor, group: Any = None) -> list[Tensor]:
        return gather_all_tensors(result, self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> _GatherIn:
        return self


def share_random_state(mesh: DeviceMesh) -> None:
    """Take over the random states of the group's first process: masks of what is whole must be alike."""
    own = mesh["tensor_parallel"]
    held = [random_state()]
    distributed.broadcast_object_list(held, src=int(own.mesh[0]), group=own.get_group())
    set_random_state(held[0])
