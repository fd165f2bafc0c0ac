"""How the tensors of a hub checkpoint make up those of a transformers model.

transformers 5 renames keys on loading, adds or drops the base model's prefix, and fuses tensors, such as a mixture's
experts. This module applies transformers' rules and operations, in both directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from lora_lightning.lora.formats.tensor_files import DTYPES
from lora_lightning.lora.meta.checkpoint import Checkpoint
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
    prefix = model.base_model_prefix
    groups: list[Group] = []
    fused: dict[str, tuple[WeightConverter, dict[str, str]]] = {}
    for key in sorted(checkpoint.stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state and pattern is None:
            groups.append(single_group(key, name))
        elif name in state and pattern is not None:
            fused.setdefault(name, (of_pattern[pattern], {}))[1][key] = pattern
    for name, (rule, patterns) in fused.items():
        groups.append(_fused_group(model, checkpoint, name, rule, patterns, renamings, to_write=to_write))
    return groups


def groups_to_load(model: PreTrainedModel, checkpoint: Checkpoint) -> list[Group]:
    """The groups of `groups_of` for reading only."""
    return groups_of(model, checkpoint, to_write=False)


def name_of(model: PreTrainedModel, key: str) -> str:
    """The name in the model of the tensor that a file holds under `key`."""
    renamings, converters = _rules(model)
    state: dict[str, Any] = model.state_dict()
    return rename_source_key(key, renamings, converters, model.base_model_prefix, state)[0]


def _rules(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """transformers' rules for this model: those that rename keys, and those that fuse tensors."""
    rules = get_model_conversion_mapping(model)
    return [r for r in rules if isinstance(r, WeightRenaming)], [r for r in rules if isinstance(r, WeightConverter)]


def _fused_group(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    name: str,
    rule: WeightConverter,
    patterns: dict[str, str],
    renamings: list[WeightRenaming],
    *,
    to_write: bool,
) -> Group:
    """The group of tensors that one rule fuses from the keys of `patterns`; the first of them is `name`.

    The rule is run on the meta device in both directions to learn names and shapes.

    Args:
        patterns: by key in the files, the pattern of the rule that matched it.
    """
    load = _loader(model, name, rule, patterns)
    bare_names = {_bare(apply_renamings(key, renamings), model): key for key in patterns}
    store = _storer(model, rule, bare_names) if to_write else _refuse_to_write
    stored = {key: checkpoint.stored[key] for key in patterns}
    dtypes = {key: DTYPES.get(entry.dtype, torch.uint8) for key, entry in stored.items()}
    before = {key: torch.empty(entry.shape, dtype=dtypes[key], device="meta") for key, entry in stored.items()}
    try:
        made = load(dict(before))
        after = store(made) if to_write else before
    except (RuntimeError, KeyError, ValueError, NotImplementedError) as error:
        raise LoRAError(f"the tensors that make up '{name}' cannot be fused or parted again ({error})") from error
    state = model.state_dict()
    same = after.keys() == before.keys() and all(after[key].shape == before[key].shape for key in before)
    if not same or any(n not in state or state[n].shape != tensor.shape for n, tensor in made.items()):
        raise LoRAError(
            f"'{name}' is stored as {len(patterns)} tensors, first '{next(iter(patterns))}', in a form that cannot be"
            f" {'written back: load the model and merge it in memory' if to_write else 'read tensor by tensor'}"
        )
    return Group(stored=tuple(patterns), names=tuple(made), load=load, store=store)


def _loader(
    model: PreTrainedModel, name: str, rule: WeightConverter, patterns: dict[str, str]
) -> Callable[[Tensors], Tensors]:
    def load(tensors: Tensors) -> Tensors:
        converter = copy.deepcopy(rule)
        for key, pattern in patterns.items():  # `pop`, so that the pieces are freed once they are fused
            converter.add_tensor(name, key, pattern, tensors.pop(key))  # type: ignore[arg-type]
        return _single(converter.convert(name, model=model, config=model.config))

    return load


def _storer(model: PreTrainedModel, rule: WeightConverter, keys: dict[str, str]) -> Callable[[Tensors], Tensors]:
    """The inverse of `_loader`; `keys` are the files' keys by their names without prefix and renaming."""
    reverse = rule.reverse_transform()
    assert isinstance(reverse, WeightConverter)

    def store(tensors: Tensors) -> Tensors:
        converter, first = copy.deepcopy(reverse), ""
        for name in sorted(tensors, key=dot_natural_key):
            renamed, pattern = apply_converters(name, [reverse])
            first = first or renamed
            converter.add_tensor(renamed, name, pattern or "", tensors[name])  # type: ignore[arg-type]
        made = _single(converter.convert(first, model=model, config=model.config))
        return {keys[_bare(name, model)]: tensor for name, tensor in made.items()}

    return store


def _refuse_to_write(tensors: Tensors) -> Tensors:
    raise AssertionError("these groups are for reading")


def _single(made: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _bare(name: str, model: PreTrainedModel) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")
