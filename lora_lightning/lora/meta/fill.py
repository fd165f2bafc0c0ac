"""Fill W0 of a model on the meta device from its files, tensor by tensor; each process reads its part only.

A tensor is read in blocks of rows and cast, into memory for what this process holds: the whole tensor, or its shard
where `fully_shard` or tensor parallelism has made a DTensor of the parameter. Beside the filled model, memory is needed
for two blocks, or for one tensor that the files hold in pieces, such as a layer's experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError, first_few
from lora_lightning.lora.meta.checkpoint import Checkpoint
from lora_lightning.lora.meta.inject import place_of
from lora_lightning.lora.meta.key_mapping import ATTRIBUTE, files_of

Place = tuple[slice, ...]
"""A part of a tensor: a slice of each dimension."""


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
    empty: dict[Tensor, list[str]] = {}  # with the names of each in the model: several where it is tied
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in (pair for pairs in named for pair in pairs):
        if tensor.is_meta:
            empty.setdefault(tensor, []).append(name)
    if not empty:
        return 0
    files = files_of(model)
    if files is None:
        raise LoRAError(
            f"'{next(iter(empty.values()))[0]}' is on the meta device, and it is not known where its weights lie: build"
            " the model by lora_lightning.huggingface(..., on_meta=True) or lora_lightning.on_meta"
        )
    base, checkpoint = files.base(model), files.checkpoint
    if without := [names[0] for names in empty.values() if base.of_name.keys().isdisjoint(names)]:
        raise LoRAError(
            f"{checkpoint.directory} has no values for {len(without)} tensors of {type(model).__name__} that are on the"
            f" meta device: {first_few(without)}"
        )
    sources = {next(name for name in names if name in base.of_name): tensor for tensor, names in empty.items()}
    groups = {id(base.of_name[name]): base.of_name[name] for name in sources}.values()
    stored, filled = checkpoint.stored, dict[Tensor, Tensor]()
    for group in sorted(groups, key=lambda g: (stored[g.stored[0]].file, stored[g.stored[0]].start)):
        wanted = {name: sources[name] for name in group.names if name in sources}
        whole: dict[str, Tensor] = {}
        if not group.is_alone:
            dtype = next(iter(wanted.values())).dtype
            whole = group.load({key: checkpoint.read(key).to(dtype) for key in group.stored})
        for name, tensor in wanted.items():
            _refuse_other_shape(name, whole[name].shape if whole else stored[group.stored[0]].shape, tensor)
            filled[tensor], part, place = _allocate(tensor, device)
            if whole:
                part.copy_(whole.pop(name)[place])
            else:
                _read_part(checkpoint, group.stored[0], part, place)
    for tensor, names in empty.items():
        value = filled[tensor]
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        for store, key in (place_of(model, name) for name in names):
            store[key] = value
    model.__dict__.pop(ATTRIBUTE, None)
    return len(filled)


def _refuse_other_shape(name: str, got: Sequence[int], tensor: Tensor) -> None:
    if tuple(got) != tuple(tensor.shape):
        raise LoRAError(
            f"'{name}' has shape {tuple(got)} in the files and {tuple(tensor.shape)} in the model: they belong to"
            " another architecture, or to another config"
        )


def _allocate(tensor: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor, Place]:
    """A tensor like the one on the meta device, the part of it that this process holds, and the part's place."""
    if type(tensor) in (Tensor, nn.Parameter):
        value = torch.empty_like(tensor, device=device)
        return value, value, tuple(map(slice, value.shape))
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        raise LoRAError(f"a {type(tensor).__name__} on the meta device cannot be filled from files: load it whole")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    sharded: DTensor = torch.empty_like(tensor, device=tensor.device_mesh.device_type)  # type: ignore[assignment]
    return sharded, sharded.to_local(), tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def _read_part(checkpoint: Checkpoint, key: str, into: Tensor, place: Place) -> None:
    """Read the part of a tensor at `place` into `into`, block by block."""
    if not place:
        into.copy_(checkpoint.read(key))
        return
    done = 0
    for rows in checkpoint.blocks(key, place[0].start or 0, place[0].stop):
        into[done : done + len(rows)].copy_(rows[:, *place[1:]])
        done += len(rows)
