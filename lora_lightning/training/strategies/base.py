"""What the module and its callbacks know of a strategy that shards W0, and how to read a sharded W0.

Law 2 under sharding: the fingerprint equals that of a single process. The processes gather one tensor each, in turn,
and hash in parallel; none holds more than one whole tensor. A check that W0 has not moved needs no gathering: each
process compares the fingerprints of its shards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_lightning.lora.frozen.fingerprint import Fingerprint, digests, fingerprint_of_digests, fingerprint_of_tensors
from lora_lightning.lora.frozen.fingerprint import fingerprint as of_one_process
from lora_lightning.lora.frozen.tensors import base_tensors
from lora_lightning.training.strategies.collectives import gather, rank, world_size


class ShardedStrategy(ABC):
    """A strategy under which each process holds its shard of W0, of the adapter and of the optimizer's state."""

    @abstractmethod
    def shard_module(self, module: Any) -> None:
        """Shard the backbone of a `LoRAModule` in place, from process 0's values, or refuse it by name."""


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only its shard of the model."""
    return isinstance(model, FSDPModule)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or the tensor where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fingerprint(model: nn.Module) -> Fingerprint:
    """W0's fingerprint, as in `lora.frozen`; of a sharded model all processes must call it."""
    if not is_sharded(model):
        return of_one_process(model)
    tensors, waiting = base_tensors(model), list[Future[dict[str, str]]]()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for number, (name, tensor) in enumerate(tensors.items()):
            to = number % world_size()
            if to == rank() and waiting:
                waiting[-1].result()  # frees the tensor before the next one comes
            whole = gather_to(tensor, to)
            if whole is not None:
                waiting.append(pool.submit(digests, {name: whole}))
        parts = gather([future.result() for future in waiting])
    by_name = {name: digest for part in parts for each in part for name, digest in each.items()}
    return fingerprint_of_digests({name: by_name[name] for name in tensors})


def gather_to(tensor: Tensor, to: int) -> Tensor | None:
    """The whole tensor in process `to`, and None in the others; all must call it."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor) or world_size() == 1:
        return local_shard(tensor) if to == rank() else None
    rows = -(-tensor.shape[0] // world_size())  # of a chunk; the last may be short or empty
    row = (tensor.numel() // max(tensor.shape[0], 1)) * tensor.element_size()
    chunk = torch.zeros(rows * row, dtype=torch.uint8, device=tensor.device)
    local = tensor.to_local().contiguous().reshape(-1).view(torch.uint8)
    chunk[: local.numel()] = local
    pieces = [torch.empty_like(chunk) for _ in range(world_size())] if to == rank() else None
    if chunk.numel():
        distributed.gather(chunk, pieces, dst=to)
    if pieces is None:
        return None
    return torch.cat(pieces)[: tensor.shape[0] * row].view(tensor.dtype).view(tensor.shape)


def shard_fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of this process's shards of W0."""
    return fingerprint_of_tensors({name: local_shard(tensor) for name, tensor in base_tensors(model).items()})


def moved_tensors(before: Fingerprint, after: Fingerprint) -> list[str]:
    """Names of tensors whose shard differs in any process; the same in all processes."""
    return list(dict.fromkeys(name for part in gather(before.differences(after)) for name in part))
