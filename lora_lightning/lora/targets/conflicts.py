"""Selected modules that exclude each other: one weight adapted twice, or two adapters with one place in a file."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.tensors import full_name, get_module
from lora_lightning.lora.targets.select import Selection


def refuse_shared_weights(selection: Selection) -> None:
    """Refuse a weight that two selected layers share: it would be merged into twice."""
    names: dict[int, list[str]] = {}
    for target in selection.targets:
        for weight in target.kind.layout(target.module, target.settings).weights:
            names.setdefault(id(target.module._parameters[weight]), []).append(target.name)
    for token in selection.tokens:
        names.setdefault(id(token.module.weight), []).append(token.name)
    for twins in names.values():
        if len(set(twins)) < len(twins):
            raise TargetError(f"'{twins[0]}' is selected twice: name it in one field of the config only")
        if len(twins) > 1:
            raise TargetError(f"'{twins[0]}' and '{twins[1]}' share one weight: adapt one of them, exclude the other")


def refuse_one_place(model: nn.Module, selection: Selection) -> None:
    """Refuse a module of `target_modules` that has a bare parameter in `target_parameters`.

    PEFT refuses this, and its file would hold both pairs of factors under one key. PEFT takes an attention and its
    `out_proj` for one module.
    """
    adapted: dict[str, str] = {}
    for target in sorted(selection.targets, key=lambda t: t.parameter != ""):  # modules first
        owner = target.name.rpartition(".")[0] if target.parameter else target.name
        parent, _, last = owner.rpartition(".")
        if last == "out_proj" and isinstance(get_module(model, parent), nn.MultiheadAttention):
            owner = parent
        if not target.parameter:
            adapted[owner] = target.name
        elif owner in adapted:
            is_attention = isinstance(get_module(model, owner), nn.MultiheadAttention)
            out_proj = full_name(owner, "out_proj")
            alternative = f", or '{owner}' and '{out_proj}' in target_modules" if is_attention else ""
            raise TargetError(
                f"an adapter's file has one place for '{adapted[owner]}' of target_modules and '{target.name}' of"
                f" target_parameters: name the weights of both in target_parameters{alternative}"
            )
