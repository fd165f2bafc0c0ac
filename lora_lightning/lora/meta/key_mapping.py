"""Read W0 by its names in the model from files that may hold it under other names or in pieces."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, LoRAError, first_few
from lora_lightning.lora.formats.provenance import warn_of_other_base
from lora_lightning.lora.formats.tensor_files import Checkpoint
from lora_lightning.lora.frozen.fingerprint import fingerprint_of_tensors
from lora_lightning.lora.frozen.tied_weights import shared_parameters

Tensors = dict[str, Tensor]

ATTRIBUTE = "weight_files"
"""The attribute of a model that holds its `Checkpoint` and its function of groups until it is filled."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors of the files that make up tensors of the model: one for one, or experts' matrices for their stack.

    `load` makes the model's of the files', without arithmetic, and may empty its argument; `store` is its inverse.
    """

    stored: tuple[str, ...]
    names: tuple[str, ...]
    load: Callable[[Tensors], Tensors]
    store: Callable[[Tensors], Tensors]
    is_alone: bool = False
    """Whether the files hold one tensor as the model does, so that parts of it can be read."""


def single_group(key: str, name: str) -> Group:
    """The group of a tensor that the files hold as the model does."""
    return Group(
        stored=(key,),
        names=(name,),
        load=lambda tensors: {name: tensors[key]},
        store=lambda tensors: {key: tensors[name]},
        is_alone=True,
    )


def names_by_tensor(model: nn.Module) -> list[list[str]]:
    """The names of each tensor in the model's state dict: several where it is tied."""
    by_id: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            by_id.setdefault(id(tensor), []).append(name)
    return list(by_id.values())


class Base:
    """W0, read on demand; the last group is in memory until `forget`."""

    def __init__(self, checkpoint: Checkpoint, groups: list[Group], plain: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.of_name = {name: group for group in groups for name in group.names}
        self.of_key = {key: group for group in groups for key in group.stored}
        self.ties = {name: names for names in names_by_tensor(plain) for name in names}
        """By name, all names of the same tensor in the plain model."""
        self._kept: dict[int, Tensors] = {}

    def source(self, name: str) -> str | None:
        """The name under which the files have this tensor: the name itself, or one that it is tied to."""
        return next((n for n in (name, *self.ties.get(name, [])) if n in self.of_name), None)

    def __call__(self, name: str) -> Tensor | None:
        """W0's tensor; None where the files have none."""
        source = self.source(name)
        return None if source is None else self.load(self.of_name[source])[source]

    def load(self, group: Group) -> Tensors:
        """A group's tensors by their names in the model."""
        if id(group) not in self._kept:
            self.forget()
            self._kept[id(group)] = group.load({key: self.checkpoint.stored[key].read() for key in group.stored})
        return self._kept[id(group)]

    def forget(self) -> None:
        """Free the last group."""
        self._kept.clear()

    def untie_unequal(self, model: nn.Module) -> None:
        """Untie parameters that the files hold twice with different values, as loading does."""
        names = {module: name for name, module in model.named_modules()}
        for places in shared_parameters(model).values():
            there = [(m, key, f"{names[m]}.{key}".removeprefix(".")) for m, key in places]
            there = [place for place in there if place[2] in self.of_name]
            for module, key, name in there[1:]:
                first, other = self(there[0][2]), self(name)
                if first is not None and other is not None and not torch.equal(first, other):
                    parameter = module._parameters[key]
                    assert parameter is not None
                    module._parameters[key] = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
        self.forget()

    def refuse_other_shapes(self, state: Mapping[str, Tensor], brought: Collection[str]) -> None:
        """Refuse a file's tensor of another shape than the model's, but for those that are `brought` whole."""
        for name, group in self.of_name.items():
            if len(group.stored) > 1 or len(group.names) > 1 or name in brought:
                continue
            got, wanted = self.checkpoint.stored[group.stored[0]].shape, tuple(state[name].shape)
            if got != wanted:
                files = f"'{group.stored[0]}' has shape {got} in the base's files"
                raise LoRAError(f"{files} and the model that config.json describes has {wanted}: name another base")


def by_name(model: nn.Module, checkpoint: Checkpoint) -> list[Group]:
    """The groups of files whose tensors have the model's names."""
    state = model.state_dict()
    return [single_group(key, key) for key in checkpoint.stored if key in state]


def keep_files(model: nn.Module, files: Sequence[Path], groups_of: Callable[..., list[Group]] = by_name) -> Checkpoint:
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


class BaseCheck:
    """Compares W0, while it is read, with the digests in an adapter's record."""

    def __init__(
        self, expected: Mapping[str, str], base: Base, buffers: Collection[str], *, allow_other_base: bool = False
    ) -> None:
        self.expected, self.base, self.buffers = expected, base, buffers
        self.allow_other_base, self.is_the_base = allow_other_base, True
        self.different: list[str] = []
        self.seen: set[str] = set()
        self.dtype: torch.dtype | None = None

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
