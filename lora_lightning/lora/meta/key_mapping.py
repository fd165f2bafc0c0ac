"""Read W0 by its names in the model from files that may hold it under other names or in pieces."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, LoRAError, first_few
from lora_lightning.lora.formats.provenance import warn_of_other_base
from lora_lightning.lora.formats.tensor_files import Checkpoint, Stored
from lora_lightning.lora.frozen.fingerprint import fingerprint_of_tensors

Tensors = dict[str, Tensor]

ATTRIBUTE = "weight_files"
"""The attribute of a model that holds its `Checkpoint` and its function of groups until it is filled."""


@dataclass(eq=False)
class Group:
    """Tensors of the files that make up tensors of the model: here one that both hold alike."""

    stored: list[str]
    names: list[str]
    is_alone: ClassVar[bool] = True
    """Whether the files hold one tensor as the model does, so that parts of it can be read."""

    def load(self, tensors: Tensors) -> Tensors:
        """The model's tensors of the files', without arithmetic; may empty its argument."""
        return {self.names[0]: tensors[self.stored[0]]}

    def store(self, tensors: Tensors) -> Tensors:
        """The inverse of `load`."""
        return {self.stored[0]: tensors[self.names[0]]}


def swap_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """Give `model` these tensors under these names, parameters as parameters; returns those that it had.

    A tensor under several names becomes one parameter.
    """
    before, made = Tensors(), dict[int, nn.Parameter]()
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        store: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
        before[name] = store[key]
        if store is module._parameters and not isinstance(tensor, nn.Parameter):
            bare = nn.Parameter(tensor, requires_grad=before[name].requires_grad)
            store[key] = made.setdefault(id(tensor), bare)
        else:
            store[key] = tensor
    return before


def names_by_tensor(model: nn.Module) -> list[list[str]]:
    """The names of each tensor in the model's state dict: several where it is tied."""
    by_id: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            by_id.setdefault(id(tensor), []).append(name)
    return list(by_id.values())


class Base:
    """W0, read on demand; the last group is in memory until `forget`."""

    def __init__(self, checkpoint: Checkpoint, groups: Sequence[Group], plain: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.of_name = {name: group for group in groups for name in group.names}
        self.of_key = {key: group for group in groups for key in group.stored}
        self.ties = {name: names for names in names_by_tensor(plain) for name in names}
        """By name, all names of the same tensor in the plain model."""
        self._last: tuple[Group, Tensors] | None = None

    def source(self, name: str) -> str | None:
        """The name under which the files have this tensor: the name itself, or one that it is tied to."""
        return next((n for n in (name, *self.ties.get(name, [])) if n in self.of_name), None)

    def __call__(self, name: str) -> Tensor | None:
        """W0's tensor; None where the files have none."""
        source = self.source(name)
        return None if source is None else self.load(self.of_name[source])[source]

    def load(self, group: Group) -> Tensors:
        """A group's tensors by their names in the model."""
        if self._last is None or self._last[0] is not group:
            self.forget()
            self._last = group, group.load({key: self.checkpoint.stored[key].read() for key in group.stored})
        return self._last[1]

    def forget(self) -> None:
        """Free the last group."""
        self._last = None

    def place(self, name: str) -> Stored:
        """The files' tensor with this name in the model, or the first of those that make it up."""
        return self.checkpoint.stored[self.of_name[name].stored[0]]

    def blocks(self, name: str, rows: slice = slice(None)) -> Iterator[Tensor]:
        """The rows of a tensor, in blocks where its file holds it as the model does; else, and a scalar, in one."""
        if self.of_name[name].is_alone and self.place(name).shape:
            yield from self.place(name).blocks(rows.start or 0, rows.stop)
        else:
            tensor = self.load(self.of_name[name])[name]
            yield tensor[rows] if tensor.dim() else tensor

    def untie_unequal(self, model: nn.Module) -> None:
        """Untie parameters that the files hold twice with different values, as loading does."""
        state = model.state_dict(keep_vars=True)
        for names in names_by_tensor(model):
            first, *others = [name for name in names if name in self.of_name] or [""]
            for name in others:
                if not torch.equal(self.load(self.of_name[first])[first], self.load(self.of_name[name])[name]):
                    swap_tensors(model, {name: torch.empty_like(state[name])})
        self.forget()

    def refuse_other_shapes(self, state: Mapping[str, Tensor], brought: Collection[str]) -> None:
        """Refuse a file's tensor of another shape than the model's, but for those that are `brought` whole."""
        for name, group in self.of_name.items():
            got, wanted = self.place(name).shape, tuple(state[name].shape)
            if group.is_alone and name not in brought and got != wanted:
                files = f"'{group.stored[0]}' has shape {got} in the base's files"
                raise LoRAError(f"{files} and the model that config.json describes has {wanted}: name another base")


def by_name(model: nn.Module, checkpoint: Checkpoint) -> Sequence[Group]:
    """The groups of files whose tensors have the model's names."""
    state = model.state_dict()
    return [Group([key], [key]) for key in checkpoint.stored if key in state]


def keep_files(
    model: nn.Module, files: Sequence[Path], groups_of: Callable[..., Sequence[Group]] = by_name
) -> Checkpoint:
    """Record where a model's weights are until it is filled: in safetensors files of one folder.

    `groups_of`, a function with an import path (for pickle), decides which of their tensors make up which of the
    model's. A LoRAError where a file is missing, torn or no safetensors file.
    """
    if wrong := next((file.name for file in files if file.suffix != ".safetensors"), None):
        raise LoRAError(f"on_meta reads safetensors files, got {wrong}: save it so, or leave on_meta out")
    checkpoint = Checkpoint(files[0].parent, [file.name for file in files])
    model.__dict__[ATTRIBUTE] = checkpoint, groups_of
    return checkpoint


def base_of(model: nn.Module) -> Base | None:
    """The model's W0, read on demand; None for a model that is filled or was not built on the meta device."""
    if ATTRIBUTE not in model.__dict__:
        return None
    checkpoint, groups_of = model.__dict__[ATTRIBUTE]
    return Base(checkpoint, groups_of(model, checkpoint), model)


@dataclass
class BaseCheck:
    """Compares W0, while it is read, with the digests in an adapter's record."""

    expected: Mapping[str, str]
    base: Base
    buffers: Collection[str]
    allow_other_base: bool = False
    is_the_base: bool = True
    different: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    dtype: torch.dtype | None = None

    def see(self, group: Group) -> None:
        """Compare a group's tensors with the digests of the base that the adapter was made on."""
        if self.seen.issuperset(group.names):
            return
        for name, tensor in self.base.load(group).items():
            tied = [n for n in self.base.ties.get(name, [name]) if n == name or n not in self.base.of_name]
            recorded = [n for n in tied if n in self.expected]
            self.seen |= {name, *tied}
            if recorded and not self._has_digest(tensor, {self.expected[n] for n in recorded}):
                self.different += recorded

    def refuse(self, *, whole: bool) -> None:
        """Raise an AdapterError with the names that differ so far; where another base is allowed, warn at the end.

        Once the `whole` of W0 was seen, tensors that were not seen are missing.
        """
        unseen = [n for n in self.expected if n not in self.seen and n not in self.buffers] if whole else []
        different = [*self.different, *unseen]
        if not different:
            return
        self.is_the_base = False
        message = (
            f"the adapter was made on another base: {len(different)} of {len(self.expected)} tensors differ, first"
            f" {first_few(different)}"
        )
        if not self.allow_other_base:
            raise AdapterError(f"{message}. Name the base that it was made on, or allow another: allow_other_base")
        if whole:
            warn_of_other_base(message)

    def _has_digest(self, tensor: Tensor, digests: set[str]) -> bool:
        """Whether the tensor has these digests, in its dtype or in another in which the base may have been loaded."""
        dtypes = [tensor.dtype]
        if tensor.is_floating_point():
            dtypes += [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        for dtype in sorted(dict.fromkeys(dtypes), key=lambda dtype: dtype != self.dtype):  # the last one first
            if set(fingerprint_of_tensors({"": tensor.to(dtype)}).tensors.values()) == digests:
                self.dtype = dtype
                return True
        return False
