"""A combination as an adapter of the model: the config that injects it, and its tensors put in."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lightning.lora.bank.combine import Mixed, blocks
from lora_lightning.lora.bank.detached import Held
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.peft.load import load_tensors
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import LoRAParameter, SavedCopy
from lora_lightning.lora.layers.trained.module_copy import COPY


def config_of(mixed: Mapping[str, Mixed], saved: list[str]) -> LoRAConfig:
    """What injects layers of these ranks, with a scale of 1."""
    ranks = {f"^{re.escape(layer.name)}$": layer.rank for layer in mixed.values()}
    bare = [layer.name for layer in mixed.values() if isinstance(layer.like, LoRAParameter)]
    modules = [layer.name for layer in mixed.values() if layer.name not in bare]
    specs = {layer.name: layer.like.lora_settings.slices for layer in mixed.values() if not layer.whole}
    return LoRAConfig(
        target_modules=f"(?:{'|'.join(map(re.escape, modules))})" if modules else [],
        target_parameters=bare or None,
        modules_to_save=saved or None,
        slices={f"^{re.escape(name)}$": spec.to_spec() for name, spec in specs.items() if spec},
        rank_pattern=ranks,
        alpha_pattern={pattern: float(rank) for pattern, rank in ranks.items()},
    )


def saved_tensors(sources: Mapping[str, Held], mixed: Mapping[str, Mixed]) -> dict[str, dict[str, Tensor]]:
    """The copies of `modules_to_save` by the module's name: those that one adapter has, or that are equal in all.

    Raises:
        LoRAError: two adapters have different values for one module, or another adapts what one saved.
    """
    found: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for name, held in sources.items():
        for share in held.shares:
            if not issubclass(share.grafted, SavedCopy):
                continue
            copy: nn.Module = share.stores["_modules"][COPY]
            state = {key: tensor.detach() for key, tensor in copy.state_dict().items()}
            other, there = found.setdefault(share.path, (name, state))
            if any(not torch.equal(tensor, there[key]) for key, tensor in state.items()):
                raise LoRAError(
                    f"'{other}' and '{name}' both saved '{share.path}' in full, with different values, and a head has"
                    f" no update to add: combine adapters that share it, or save them without it"
                )
    for path, (name, _) in found.items():
        both = [layer.name for layer in mixed.values() if f"{layer.name}.".startswith(f"{path}.")]
        if both:
            raise LoRAError(
                f"'{name}' saved '{path}' in full, and another adapts '{both[0]}' by A and B: combine adapters that"
                f" train it in one way"
            )
    return {path: state for path, (_, state) in found.items()}


@torch.no_grad()
def fill(model: nn.Module, mixed: Mapping[str, Mixed], saved: Mapping[str, dict[str, Tensor]]) -> None:
    """Write the combination into the model that was injected for it."""
    for path, layer in adapted_layers(model):
        for (A, B), (own_a, own_b) in zip(mixed[path].pairs, blocks(layer), strict=True):
            own_a.copy_(A)
            own_b.copy_(B)
    copies = {f"{path}.{COPY}.{key}": tensor for path, state in saved.items() for key, tensor in state.items()}
    load_tensors(model, {**adapter_tensors(model), **copies})
