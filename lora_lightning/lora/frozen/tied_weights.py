"""Parameters that modules share, and how a merge unties them."""

from __future__ import annotations

import copy

from torch import nn

from lora_lightning.lora.frozen.tensors import full_name, named_modules
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a

Place = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""


def shared_parameters(model: nn.Module) -> dict[int, list[Place]]:
    """The places of each parameter that more than one module holds, by the parameter's id."""
    places: dict[int, list[Place]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return {key: group for key, group in places.items() if len(group) > 1}


def untied_since(model: nn.Module, before: dict[int, list[Place]]) -> list[str]:
    """Names of the modules that have replaced a parameter that they shared in `before`."""
    names = {module: name for name, module in named_modules(model)}
    untied: list[str] = []
    for key, group in before.items():
        now = {id(module._parameters.get(name)) for module, name in group}
        if len(now) > 1:
            untied += [names[module] for module, name in group if id(module._parameters.get(name)) != key]
    return list(dict.fromkeys(untied))


def untie_config(model: nn.Module) -> None:
    """Set `tie_word_embeddings` of a transformers config to False once input and output embeddings differ.

    Otherwise `from_pretrained` ties them again and drops one of the two trained matrices. This one flag governs all
    ties of a model, so its other shared parameters are copied, and `save_pretrained` writes each.
    """
    for module in model.modules():
        if not is_a(module, HF_MODEL):
            continue
        head, table = module.get_output_embeddings(), module.get_input_embeddings()  # type: ignore[operator]
        if head is None or table is None or head.weight is table.weight:
            continue
        for config in (module.config, module.config.get_text_config(decoder=True)):  # type: ignore[union-attr,operator]
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        tied = module.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
        still_tied, names = {*tied, *tied.values()}, {inner: name for name, inner in named_modules(module)}
        for group in shared_parameters(module).values():
            loose = [(owner, key) for owner, key in group if full_name(names[owner], key) not in still_tied]
            for owner, key in loose[len(loose) == len(group) :]:
                owner._parameters[key] = copy.deepcopy(owner._parameters[key])
