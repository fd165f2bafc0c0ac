"""Where a process's part of a sharded tensor lies in the whole, and the way there and back.

FSDP2 lays rows in chunks over the first dimension of a mesh, of which the last may be short or empty. Before that,
tensor parallelism splits the whole, evenly and along any side, or leaves it whole, over the mesh's second dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from lora_lightning.training.distributed import rank


def split_side(tensor: DTensor) -> int | None:
    """The side along which tensor parallelism has split it; None where it has not."""
    if tensor.device_mesh.ndim == 1 or tensor.placements[1].is_replicate():
        return None
    return int(tensor.placements[1].dim)  # type: ignore[attr-defined]


def gathered_by(tensor: DTensor, to: int) -> Tensor | None:
    """The whole tensor in one process, and None in the others; all must call it."""
    mesh, side = tensor.device_mesh, split_side(tensor)
    ranks: list[int] = mesh.mesh.flatten().tolist()
    if to not in ranks:  # what is not split, each process's own data-parallel group has whole
        return None
    count = mesh.size(0)
    parts = len(ranks) // count
    shape = list(tensor.shape)
    if side is not None:
        shape[side] //= parts
    row = (_numbers(shape) // max(shape[0], 1)) * tensor.element_size()
    own = torch.zeros(-(-shape[0] // count) * row, dtype=torch.uint8, device=tensor.device)
    mine = tensor.to_local().contiguous().reshape(-1).view(torch.uint8)
    own[: mine.numel()] = mine
    pieces = [torch.empty_like(own) for _ in ranks] if to == rank() else None
    if own.numel():
        distributed.gather(own, pieces, dst=to, group=mesh.get_group() if mesh.ndim == 1 else None)
    if pieces is None:
        return None
    found = [
        torch.cat(pieces[part::parts])[: shape[0] * row].view(tensor.dtype).view(shape)
        for part in range(1 if side is None else parts)
    ]
    return found[0] if side is None else torch.cat(found, dim=side)


def _numbers(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def laid_as(whole: Tensor, like: DTensor) -> DTensor:
    """A whole tensor of the same shape, in parts as `like` lies; no process tells another anything."""
    mesh, side = like.device_mesh, split_side(like)
    part = whole.to(like.device)
    if side is not None:
        part = torch.chunk(part, mesh.size(1), dim=side)[mesh.get_local_rank(1)]
    size = -(-part.shape[0] // mesh.size(0))
    part = part[size * mesh.get_local_rank(0) :][:size].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        part, mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )
