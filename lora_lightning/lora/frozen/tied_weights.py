"""Parameters that two modules share, and what a merge does to them."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.frozen.tensors import named_modules
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a

Place = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""


def shared_parameters(model: nn.Module) -> dict[int, list[Place]]:
    """By the parameter's id, the places of each parameter that more than one of the model's modules holds."""
    places: dict[int, list[Place]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return {key: group for key, group in places.items() if len(group) > 1}


def untied_since(model: nn.Module, before: dict[int, list[Place]]) -> list[str]:
    """Names of the modules that no longer hold the parameter that they shared in `before`, where others still do."""
    names = {module: name for name, module in named_modules(model)}
    untied: list[str] = []
    for key, group in before.items():
        now = {id(module._parameters.get(name)) for module, name in group}
        if len(now) > 1:
            untied += [names[module] for module, name in group if id(module._parameters.get(name)) != key]
    return list(dict.fromkeys(untied))


def untie_config(model: nn.Module) -> None:
    """Have a transformers config say that input and output embeddings are two, once they are.

    Otherwise `from_pretrained` ties them again and drops one of the two trained matrices. The one flag of the config
    governs all of a model's ties, so whatever it held together and is still shared gets parameters of its own, and
    `save_pretrained` writes each.
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
        _untie(module, {*tied, *tied.values()})


def _untie(model: nn.Module, still_tied: set[str]) -> None:
    """Give each place of a shared parameter its own copy, but for one, and for those that loading ties again."""
    names = {module: name for name, module in named_modules(model)}
    for group in shared_parameters(model).values():
        loose = [(module, name) for module, name in group if f"{names[module]}.{name}".lstrip(".") not in still_tied]
        for module, name in loose[len(loose) == len(group) :]:
            tied = module._parameters[name]
            assert tied is not None
            module._parameters[name] = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)
