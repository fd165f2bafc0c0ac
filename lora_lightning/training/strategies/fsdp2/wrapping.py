"""FSDP2 on an adapted backbone: what is sharded, what stays whole, and what is refused by name.

Each block is gathered for its forward and its backward, and is sharded in between; every process keeps its rows of W0
and of the adapter. The rest (embeddings, the head, modules between blocks) is gathered from a step's beginning until
after its backward, so that a task may read a head's weight beside the forward.

The fused arithmetic saves a weight's gathered tensor for backward, which FSDP2 fills again before a block's backward.
An input is not recomputed from another block's norm, whose weight is sharded then; and no process times products for
itself, so that all processes, and a resumed fit, round alike.
"""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lora_lightning.lora.errors import LoRAError, did_you_mean, first_few
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.targets.blocks import repeated_blocks
from lora_lightning.training.strategies.collectives import world_size


def shard(
    backbone: nn.Module,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    blocks: Sequence[str] | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shard a backbone over a mesh of one dimension in place, with process 0's values; options as FSDP2Strategy's."""
    if quantized := [name for name, module in backbone.named_modules() if scheme(module) is not None]:
        raise LoRAError(
            f"FSDP2 shards plain weights, and {first_few(quantized)} are quantized: load the backbone in bfloat16, or"
            " train it with --trainer.strategy ddp"
        )
    chosen = groups_of(backbone) if blocks is None else named_blocks(backbone, blocks)
    whole = parameters_left_whole(backbone, chosen)
    _report_blocks(backbone, chosen, whole, mesh.size())
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": set(whole.values())}
    options["offload_policy"] = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    done: set[int] = set()
    for module in chosen.values():
        broadcast_unsharded(module, device, done)
        fully_shard(module, reshard_after_forward=reshard_after_forward, **options)
    broadcast_unsharded(backbone, device, done)
    root: Any = fully_shard(backbone, reshard_after_forward=False, **options)
    # Parameters that one process's batch does not reach, such as an expert's, get zero gradients: else shapes differ.
    root.set_reduce_scatter_unused_params(True)
    if callable(generate := getattr(root, "generate", None)):

        @functools.wraps(generate)
        def unshard_and_generate(*args: Any, **kwargs: Any) -> Any:
            root.unshard()  # what it calls outside of the blocks
            return generate(*args, **kwargs)

        root.generate = unshard_and_generate


def parameters_left_whole(backbone: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Frozen parameters that cannot be sharded: scalars, and those that several blocks share."""
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    outside = [module for module in backbone.modules() if id(module) not in inside]
    places = Counter(id(p) for block in blocks.values() for p in block.parameters())
    places.update({id(p) for module in outside for p in module.parameters(recurse=False)})
    whole = {name: p for name, p in backbone.named_parameters() if not p.dim() or places[id(p)] > 1}
    if trained := [name for name, parameter in whole.items() if parameter.requires_grad]:
        raise LoRAError(
            f"FSDP2 cannot train what has no rows or stands in several blocks: {first_few(trained)}; exclude it from"
            " lora.target_modules or lora.modules_to_save, or train with --trainer.strategy ddp"
        )
    return whole


def broadcast_unsharded(module: nn.Module, device: torch.device, done: set[int]) -> None:
    """Put what is not yet sharded on the device, with process 0's values: each process has another random A."""
    for tensor in (*module.parameters(), *module.buffers()):
        if isinstance(tensor, DTensor) or tensor.is_meta or id(tensor) in done:
            continue
        done.add(id(tensor))
        tensor.data = tensor.data.to(device).contiguous()  # FSDP2 takes no other
        if world_size() > 1 and tensor.numel():
            distributed.broadcast(tensor.data.reshape(-1).view(torch.uint8), src=0)


def _report_blocks(backbone: nn.Module, blocks: Mapping[str, nn.Module], whole: Mapping[str, Any], count: int) -> None:
    if blocks:
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in blocks.values()))
        rank_zero_info(f"FSDP2: W0 and the adapter lie in {count} parts; gathered one by one: {len(blocks)} x {kinds}")
    else:
        rank_zero_warn(
            f"FSDP2: no repeated blocks were found in {type(backbone).__name__}, so it is gathered as one, all of W0 at"
            " a time; FSDP2Strategy.blocks names modules to gather one by one"
        )
    if whole:
        rank_zero_info(f"FSDP2: every process holds the whole of {first_few(list(whole))}, scalars or shared by blocks")


def groups_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks that have a forward; FSDP2 gathers a block before its forward."""
    lists = (nn.ModuleList, nn.ModuleDict)
    return {name: block for name, block in repeated_blocks(model).items() if not isinstance(block, lists)}


def named_blocks(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules whose names match a pattern, which must fit one with parameters; `*` stands for anything."""
    modules = {name: m for name, m in model.named_modules() if name and next(m.parameters(), None) is not None}
    for pattern in patterns:
        if not fnmatch.filter(modules, pattern):
            near = did_you_mean(pattern, modules)
            raise LoRAError(f"FSDP2Strategy.blocks: '{pattern}' fits no module with parameters{near}")
    return {name: m for name, m in modules.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
