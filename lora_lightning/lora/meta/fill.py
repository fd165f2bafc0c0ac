"""Fill W0 of a model on the meta device from its files, tensor by tensor; each process reads its part only.

A tensor is read in blocks of rows and cast, into memory for what this process holds: the whole tensor, or its shard
where `fully_shard` or tensor parallelism has made a DTensor of the parameter. Beside the filled model, memory is needed
for two blocks, or for one tensor that the files hold in pieces, such as a layer's experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError, first_few
from lora_lightning.lora.meta.checkpoint import Checkpoint
from lora_lightning.lora.meta.key_mapping import ATTRIBUTE, Base, Group, files_of


@dataclass
class Empty:
    """A tensor that the model holds on the meta device."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    """Its names in the model: several where it is tied."""
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """The dictionaries of the modules that hold it, and its keys there."""


@torch.no_grad()
def fill_from_files(model: nn.Module, device: torch.device | str = "cpu") -> int:
    """Fill the tensors of `model` that are on the meta device; ties stay, and other tensors do not change.

    For a model that `huggingface(..., on_meta=True)` or `on_meta` built, before or after it was sharded. Returns the
    number of filled tensors, 0 where none is on the meta device.

    Args:
        device: of whole tensors; a shard is on its mesh's device.

    Raises:
        LoRAError: the model does not know its weight files, or they lack a tensor; the model is then unchanged.
    """
    empty = _empty_tensors(model)
    if not empty:
        return 0
    files = files_of(model)
    if files is None:
        raise LoRAError(
            f"'{empty[0].names[0]}' is on the meta device, and it is not known where its weights lie: build the model"
            " by lora_lightning.huggingface(..., on_meta=True) or lora_lightning.on_meta"
        )
    base = files.base(model)
    sources = {name: slot for slot in empty if (name := next((n for n in slot.names if n in base.of_name), None))}
    if without := [slot.names[0] for slot in empty if sources.keys().isdisjoint(slot.names)]:
        raise LoRAError(
            f"{files.checkpoint.directory} has no values for {len(without)} tensors of {type(model).__name__} that are"
            f" on the meta device: {first_few(without)}"
        )
    groups = {id(base.of_name[name]): base.of_name[name] for name in sources}.values()
    stored = base.checkpoint.stored
    made: list[tuple[Empty, Tensor]] = []
    for group in sorted(groups, key=lambda g: (stored[g.stored[0]].file, stored[g.stored[0]].start)):
        made += _read(base, group, {name: sources[name] for name in group.names if name in sources}, device)
    for slot, value in made:
        _put(slot, value)
    model.__dict__.pop(ATTRIBUTE, None)
    return len(made)


def _empty_tensors(model: nn.Module) -> list[Empty]:
    by_id: dict[int, Empty] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.is_meta:
                    slot = by_id.setdefault(id(tensor), Empty(tensor))
                    slot.names.append(f"{path}.{name}".removeprefix("."))
                    slot.places.append((store, name))
    return list(by_id.values())


def _read(
    base: Base, group: Group, wanted: dict[str, Empty], device: torch.device | str
) -> Iterator[tuple[Empty, Tensor]]:
    """This process's part of each tensor of a group."""
    checkpoint = base.checkpoint
    if group.is_alone:
        ((name, slot),) = wanted.items()
        part, offset = _part(slot.tensor, device)
        _check_shape(name, checkpoint.stored[group.stored[0]].shape, slot)
        _read_rows(checkpoint, group.stored[0], part, offset)
        yield slot, part
        return
    dtype = next(iter(wanted.values())).tensor.dtype
    whole = group.load({key: checkpoint.read(key).to(dtype) for key in group.stored})
    for name, slot in wanted.items():
        value = whole.pop(name)
        _check_shape(name, value.shape, slot)
        part, offset = _part(slot.tensor, device)
        place = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
        yield slot, part.copy_(value[place])


def _check_shape(name: str, got: tuple[int, ...], slot: Empty) -> None:
    if tuple(got) != tuple(slot.tensor.shape):
        raise LoRAError(
            f"'{name}' has shape {tuple(got)} in the files and {tuple(slot.tensor.shape)} in the model: they belong to"
            " another architecture, or to another config"
        )


def _part(tensor: Tensor, device: torch.device | str) -> tuple[Tensor, tuple[int, ...]]:
    """Memory for this process's part of a tensor, and the part's offset in the whole."""
    if type(tensor) in (Tensor, nn.Parameter):
        part = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return part, (0,) * tensor.dim()
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        raise LoRAError(f"a {type(tensor).__name__} on the meta device cannot be filled from files: load it whole")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device_mesh.device_type), tuple(offset)


def _read_rows(checkpoint: Checkpoint, key: str, into: Tensor, offset: tuple[int, ...]) -> None:
    """Read the part of a tensor at `offset` into `into`, block by block."""
    if not into.dim():
        into.copy_(checkpoint.read(key))
        return
    done = 0
    for rows in checkpoint.blocks(key, offset[0], offset[0] + into.shape[0]):
        columns = tuple(slice(o, o + n) for o, n in zip(offset[1:], into.shape[1:], strict=True))
        into[done : done + len(rows)].copy_(rows[:, *columns])
        done += len(rows)


def _put(slot: Empty, value: Tensor) -> None:
    tensor: Any = slot.tensor
    if type(tensor) not in (Tensor, nn.Parameter):
        from torch.distributed.tensor import DTensor

        whole = {"shape": tensor.shape, "stride": tensor.stride()}
        value = DTensor.from_local(value, tensor.device_mesh, tensor.placements, run_check=False, **whole)
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    for store, name in slot.places:
        store[name] = value
