"""How the tensors of a hub checkpoint make up those of a transformers model.

transformers 5 renames keys on loading, adds or drops the base model's prefix, and fuses tensors, such as a mixture's
experts; its own rules and operations are used here, in both directions.
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
    """Which keys of the files are, or make up, which tensors of the model; keys that it has no place for are left out.

    Args:
        to_write: whether the tensors will be written back too.

    Raises:
        LoRAError: tensors are fused on loading by a rule that cannot be turned around, and are to be written.
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
    """`groups_of` that are read only."""
    return groups_of(model, checkpoint, to_write=False)


def name_of(model: PreTrainedModel, key: str) -> str:
    """The tensor of the model that a key of a file is loaded as."""
    renamings, converters = _rules(model)
    state: dict[str, Any] = model.state_dict()
    return rename_source_key(key, renamings, converters, model.base_model_prefix, state)[0]


def _rules(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Return transformers' own rules, those that rename and those that fuse."""
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
    """The tensors that one rule makes of `patterns` (by key, what matched it), the first of which is `name`.

    Tried on the meta device in both directions, which shows names and shapes.
    """
    load = _loader(model, name, rule, patterns)
    plainly = {_bare(apply_renamings(key, renamings), model): key for key in patterns}
    store = _storer(model, rule, plainly) if to_write else _refuse_to_write
    before = {k: torch.empty(checkpoint.stored[k].shape, dtype=_dtype(checkpoint, k), device="meta") for k in patterns}
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
        for key, pattern in patterns.items():  # handed over, so that the pieces go once they are in one
            converter.add_tensor(name, key, pattern, tensors.pop(key))  # type: ignore[arg-type]
        return _single(converter.convert(name, model=model, config=model.config))

    return load


def _storer(model: PreTrainedModel, rule: WeightConverter, keys: dict[str, str]) -> Callable[[Tensors], Tensors]:
    """`keys`: those in the files by their names without renaming and prefix."""
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


def _dtype(checkpoint: Checkpoint, key: str) -> torch.dtype:
    return DTYPES.get(checkpoint.stored[key].dtype, torch.uint8)
