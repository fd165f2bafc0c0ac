"""W0 by its names in the model, from files that may hold it under other names or in pieces."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, AdapterWarning, LoRAError, some
from lora_lightning.lora.frozen.fingerprint import of_tensors
from lora_lightning.lora.frozen.tied_weights import shared_parameters
from lora_lightning.lora.meta.checkpoint import Checkpoint

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors of the files that make up tensors of the model: one and one, or experts' matrices and their stack."""

    stored: tuple[str, ...]
    """Keys in the files."""
    names: tuple[str, ...]
    """Names in the model."""
    load: Callable[[Tensors], Tensors]
    """From the files' tensors to the model's, moving values only. It may empty what it is given."""
    store: Callable[[Tensors], Tensors]
    """The inverse."""
    is_alone: bool = False
    """Whether the files hold the one tensor as the model does, so that any part of it can be read by itself."""


def alone(key: str, name: str) -> Group:
    """A tensor that the files hold as the model does."""
    return Group(
        stored=(key,),
        names=(name,),
        load=lambda tensors: {name: tensors[key]},
        store=lambda tensors: {key: tensors[name]},
        is_alone=True,
    )


class Base:
    """W0, read on demand; what a module needs at once is kept until `forget`."""

    def __init__(self, checkpoint: Checkpoint, groups: list[Group], plain: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.of_name = {name: group for group in groups for name in group.names}
        self.of_key = {key: group for group in groups for key in group.stored}
        same: dict[int, list[str]] = {}
        for name, tensor in plain.state_dict(keep_vars=True).items():
            same.setdefault(id(tensor), []).append(name)
        self.ties = {name: names for names in same.values() for name in names}
        """By name, all names of the same tensor in the model before a merge."""
        self._kept: dict[int, Tensors] = {}

    def source(self, name: str) -> str | None:
        """The name under which the files have this tensor: its own, or one that it is tied to."""
        return next((n for n in (name, *self.ties.get(name, [])) if n in self.of_name), None)

    def __call__(self, name: str) -> Tensor | None:
        """W0's tensor; None where the files have none."""
        source = self.source(name)
        return None if source is None else self.load(self.of_name[source])[source]

    def load(self, group: Group) -> Tensors:
        """A group's tensors by their names in the model."""
        if id(group) not in self._kept:
            self.forget()
            self._kept[id(group)] = group.load({key: self.checkpoint.read(key) for key in group.stored})
        return self._kept[id(group)]

    def has(self, group: Group) -> bool:
        """Whether a group is in memory."""
        return id(group) in self._kept

    def forget(self) -> None:
        """Let go of what was read last."""
        self._kept.clear()

    def part_unequal(self, model: nn.Module) -> None:
        """Untie what the files hold twice with different values, as loading does."""
        names = {module: name for name, module in model.named_modules()}
        for places in shared_parameters(model).values():
            there = [(m, own, f"{names[m]}.{own}".removeprefix(".")) for m, own in places]
            there = [place for place in there if place[2] in self.of_name]
            for module, own, name in there[1:]:
                first, other = self(there[0][2]), self(name)
                if first is not None and other is not None and not torch.equal(first, other):
                    parameter = module._parameters[own]
                    assert parameter is not None
                    module._parameters[own] = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
        self.forget()

    def refuse_other_shapes(self, state: Mapping[str, Tensor], brought: Collection[str]) -> None:
        """Raise where a file's tensor has another shape than the model's; those that are `brought` whole may.

        Raises:
            LoRAError: with the first of them.
        """
        for name, group in self.of_name.items():
            if len(group.stored) > 1 or len(group.names) > 1 or name in brought:
                continue
            got, wanted = self.checkpoint.stored[group.stored[0]].shape, tuple(state[name].shape)
            if got != wanted:
                raise LoRAError(
                    f"'{group.stored[0]}' has shape {got} in the base's files and the model that config.json describes"
                    f" has {wanted}: name a base whose config fits its weights"
                )


def warn_of_other_base(told: str) -> None:
    """Say that another base was allowed, and in what it differs."""
    warnings.warn(
        f"allow_other_base: {told}. Its outputs are not those that were trained", AdapterWarning, stacklevel=2
    )


class BaseCheck:
    """Compares W0, as it is read, with the digests that an adapter carries."""

    def __init__(
        self, expected: Mapping[str, str], base: Base, buffers: Collection[str], *, allow_other_base: bool = False
    ) -> None:
        self.expected, self.base, self.buffers = expected, base, buffers
        self.allow_other_base, self.is_the_base = allow_other_base, True
        self.different: list[str] = []
        self.seen: dict[str, bool] = {}
        self.dtype: torch.dtype | None = None

    def see(self, group: Group) -> None:
        """Note whether the tensors of a group are those that the adapter was made on."""
        if all(name in self.seen for name in group.names):
            return
        for name, tensor in self.base.load(group).items():
            tied = [n for n in self.base.ties.get(name, [name]) if n == name or n not in self.base.of_name]
            asked = [n for n in tied if n in self.expected]
            self.seen |= dict.fromkeys([name, *tied], True)
            if asked and not self._is(tensor, {self.expected[n] for n in asked}):
                self.different += asked

    def refuse(self, *, whole: bool) -> None:
        """Raise where something differed; once the `whole` was seen, also where something is not there at all.

        Where another base is allowed it warns instead, once the whole was seen.

        Raises:
            AdapterError: with the names that differ.
        """
        different = list(self.different)
        if whole:
            different += [n for n in self.expected if n not in self.seen and n not in self.buffers]
        if not different:
            return
        self.is_the_base = False
        told = (
            f"the adapter was made on another base: {len(different)} of {len(self.expected)} tensors differ, first"
            f" {some(different)}"
        )
        if not self.allow_other_base:
            raise AdapterError(f"{told}. Name the base that it was made on, or allow another: allow_other_base")
        if whole:
            warn_of_other_base(told)

    def _is(self, tensor: Tensor, digests: set[str]) -> bool:
        """Whether the tensor, in its own dtype or as the adapter's base was loaded in another, has these digests."""
        own = [tensor.dtype]
        if tensor.is_floating_point():
            own += [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        for dtype in dict.fromkeys([self.dtype, *own] if self.dtype in own else own):
            assert dtype is not None
            if set(of_tensors({"": tensor.to(dtype)}).tensors.values()) == digests:
                self.dtype = dtype
                return True
        return False
