"""How the tensors of a hub checkpoint make up those of a transformers model.

transformers 5 renames keys on loading, adds or drops the base model's prefix, and fuses tensors, such as a mixture's
experts. This module applies transformers' rules and operations, in both directions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.tensor_files import DTYPES, Checkpoint
from lora_lightning.lora.meta.key_mapping import Group, Tensors, single_group


def groups_of(model: PreTrainedModel, checkpoint: Checkpoint, *, to_write: bool = True) -> list[Group]:
    """The groups of file keys that make up tensors of the model; keys without a place in it are left out.

    Args:
        to_write: whether the tensors will be written back too.

    Raises:
        LoRAError: loading fuses tensors by a rule that cannot be reversed, and `to_write` is True.
    """
    renamings, converters = _rules(model)
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state: dict[str, Any] = model.state_dict()
    groups: list[Group] = []
    fusions: dict[str, _Fusion] = {}
    for key in sorted(checkpoint.stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name in state and pattern is None:
            groups.append(single_group(key, name))
        elif name in state and pattern is not None:
            fusion = fusions.setdefault(name, _Fusion(model, of_pattern[pattern], name))
            fusion.patterns[key] = pattern
            fusion.keys[_bare(apply_renamings(key, renamings), model)] = key
    return groups + [fusion.group(checkpoint, to_write=to_write) for fusion in fusions.values()]


def name_of(model: PreTrainedModel, key: str) -> str:
    """The name in the model of the tensor that a file holds under `key`."""
    renamings, converters = _rules(model)
    state: dict[str, Any] = model.state_dict()
    return rename_source_key(key, renamings, converters, model.base_model_prefix, state)[0]


def _rules(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """transformers' rules for this model: those that rename keys, and those that fuse tensors."""
    rules = get_model_conversion_mapping(model)
    return [r for r in rules if isinstance(r, WeightRenaming)], [r for r in rules if isinstance(r, WeightConverter)]


@dataclass
class _Fusion:
    """The tensors that one rule fuses from tensors in the files; the first of them is `name`."""

    model: PreTrainedModel
    rule: WeightConverter
    name: str
    patterns: dict[str, str] = field(default_factory=dict)
    """By key in the files, the pattern of the rule that matched it."""
    keys: dict[str, str] = field(default_factory=dict)
    """The files' keys by their names without prefix and renaming."""

    def load(self, tensors: Tensors) -> Tensors:
        converter = copy.deepcopy(self.rule)
        for key, pattern in self.patterns.items():  # `pop`, so that the pieces are freed once they are fused
            converter.add_tensor(self.name, key, pattern, tensors.pop(key))  # type: ignore[arg-type]
        return self._convert(converter, self.name)

    def store(self, tensors: Tensors) -> Tensors:
        """The inverse of `load`."""
        reverse, first = self.rule.reverse_transform(), ""
        assert isinstance(reverse, WeightConverter)
        for name in sorted(tensors, key=dot_natural_key):
            renamed, pattern = apply_converters(name, [reverse])
            first = first or renamed
            reverse.add_tensor(renamed, name, pattern or "", tensors[name])  # type: ignore[arg-type]
        made = self._convert(reverse, first)
        return {self.keys[_bare(name, self.model)]: tensor for name, tensor in made.items()}

    def _convert(self, converter: WeightConverter, name: str) -> Tensors:
        made = converter.convert(name, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def group(self, checkpoint: Checkpoint, *, to_write: bool) -> Group:
        """The group; the rule runs on the meta device, in both directions if `to_write`, to learn names and shapes."""
        state, before = self.model.state_dict(), dict[str, Tensor]()
        for key in self.patterns:
            stored = checkpoint.stored[key]
            dtype = DTYPES.get(stored.dtype, torch.uint8)
            before[key] = torch.empty(stored.shape, dtype=dtype, device="meta")
        try:
            made = self.load(dict(before))
            after = self.store(made) if to_write else before
        except (RuntimeError, KeyError, ValueError, NotImplementedError) as error:
            raise LoRAError(
                f"the tensors that make up '{self.name}' cannot be fused or parted again ({error})"
            ) from error
        same = after.keys() == before.keys() and all(after[key].shape == before[key].shape for key in before)
        if not same or any(n not in state or state[n].shape != tensor.shape for n, tensor in made.items()):
            raise LoRAError(
                f"'{self.name}' is stored as {len(before)} tensors, first '{next(iter(before))}', in a form that cannot"
                f" be {'written back: load the model and merge it in memory' if to_write else 'read tensor by tensor'}"
            )
        return Group(stored=tuple(before), names=tuple(made), load=self.load, store=self.store)


def _bare(name: str, model: PreTrainedModel) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")
