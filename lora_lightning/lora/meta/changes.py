"""What a merge makes of each tensor of a model, one module at a time: the same arithmetic as `merge`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.formats.peft.resolve import Read
from lora_lightning.lora.frozen.dtype import refuse_overflow
from lora_lightning.lora.frozen.tensors import full_name
from lora_lightning.lora.frozen.tied_weights import shared_parameters, untie_config, untied_since
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy, TokenRows, TrainedBias
from lora_lightning.lora.merge import fold_bias, merged_weights
from lora_lightning.lora.merge_checks import refuse, refuse_codes
from lora_lightning.lora.meta.inject import present, start_from_present


@dataclass
class Changes:
    """The tensors that a merge changes, by their names in the model, each with what computes it."""

    read: Read
    dtype: torch.dtype | None
    """That the results are rounded to, once; None for each tensor's own."""
    kept: dict[str, float] = field(default_factory=dict)
    """By module, the share of the update that rounding kept; filled as they are computed."""
    makers: dict[str, Callable[[], dict[str, Tensor]]] = field(default_factory=dict)
    """Each gives its own tensor, and those that are computed with it."""
    parts: dict[str, Hashable] = field(default_factory=dict)
    """Of those that become tensors of their own: equal values are one tensor."""

    @classmethod
    def of(cls, model: nn.Module, read: Read, dtype: torch.dtype | None = None) -> Changes:
        """Of a model with an adapter that `load_on_meta` gave it.

        Raises:
            MergeError: the adapter is not finite, or W0 has no place for it.
        """
        refuse(model)
        changes = cls(read, dtype)
        for name, module in grafted_modules(model, TrainedBias):
            changes.makers[f"{name}.bias"] = lambda n=name, m=module: changes._bias(n, m)  # type: ignore[misc]
            changes.parts[f"{name}.bias"] = id(module.lora_trained_bias)
        for path, layer in adapted_layers(model):
            changes._add_layer(path, layer)
        for name, rows in grafted_modules(model, TokenRows):
            changes.makers[f"{name}.weight"] = lambda n=name, m=rows: changes._rows(n, m)  # type: ignore[misc]
        for name, saved in grafted_modules(model, SavedCopy):
            copied: dict[str, Tensor] = saved.lora_copy.state_dict(keep_vars=True)
            for own, tensor in copied.items():
                changes.makers[f"{name}.{own}"] = lambda n=f"{name}.{own}", t=tensor: {n: t.detach()}  # type: ignore[misc]
                changes.parts[f"{name}.{own}"] = id(tensor)
        return changes

    def _add_layer(self, path: str, layer: AdaptedLayer) -> None:
        owner = layer.lora_name(path).rpartition(".")[0] if layer.lora_owner is not layer else path
        places = {n: full_name(owner, n) for n in layer.adapted_parameters(layer.lora_owner, layer.lora_settings)}
        if layer.lora_B_bias is not None or (layer.lora_owner is layer and isinstance(layer, TrainedBias)):
            places["bias"] = full_name(path, "bias")
        for own, name in places.items():
            self.makers[name] = lambda: self._layer(path, layer, places)
            self.parts.setdefault(name, (id(layer), own))

    @torch.no_grad()
    def _layer(self, path: str, layer: AdaptedLayer, places: dict[str, str]) -> dict[str, Tensor]:
        """`W0 + s B A` of one layer's weights, and its bias, with its W0 put in for the moment."""
        owner, label = layer.lora_owner, layer.lora_name(path)
        tensors = {own: self._must_read(name) for own, name in places.items()}
        if "bias" in tensors:
            tensors["bias"] = self._wide(tensors["bias"])
        with present(owner, tensors):
            refuse_codes(label, layer)
            start_from_present(layer)
            if isinstance(layer, TrainedBias):
                refuse_overflow(f"'{full_name(path, 'bias')}'", layer.lora_trained_bias, tensors["bias"].dtype)
                layer.fold({})
            merged, self.kept[label] = merged_weights(layer, self.dtype, label=label)
            if "bias" in places:
                fold_bias(layer, label)
                bias = layer._parameters["bias"]
                assert bias is not None
                merged["bias"] = bias.detach()
        return {places[own]: tensor for own, tensor in merged.items()}

    @torch.no_grad()
    def _bias(self, name: str, module: TrainedBias) -> dict[str, Tensor]:
        key = full_name(name, "bias")
        before = self._wide(self._must_read(key))
        refuse_overflow(f"'{key}'", module.lora_trained_bias, before.dtype)
        with present(module, {"bias": before}):
            module.fold({})
            bias = module._parameters["bias"]
            assert bias is not None
            return {key: bias.detach()}

    @torch.no_grad()
    def _rows(self, name: str, module: TokenRows) -> dict[str, Tensor]:
        key = full_name(name, "weight")
        weight = self._wide(self._must_read(key))
        refuse_overflow(f"'{key}'", module.lora_tokens, weight.dtype)
        with present(module, {"weight": weight}):
            module.fold()
        return {key: weight}

    def _must_read(self, name: str) -> Tensor:
        tensor = self.read(name)
        if tensor is None:
            raise MergeError(f"the files have no '{name}', which the adapter changes")
        return tensor

    def _wide(self, tensor: Tensor) -> Tensor:
        """In the wider of its own dtype and the results', so that what is put into it is rounded once."""
        return tensor if self.dtype is None else tensor.to(torch.promote_types(tensor.dtype, self.dtype))


def part_as_merged(plain: nn.Module, parts: Mapping[str, Hashable]) -> list[str]:
    """Give a plain model on the meta device the ties that the merged one has, and its config; returns what it untied.

    `parts` as in `Changes`: as in `merge`, what is adapted or brought whole no longer shares its tensor.
    """
    ties = shared_parameters(plain)
    fresh: dict[Hashable, nn.Parameter] = {}
    for name, part in parts.items():
        module, _, own = name.rpartition(".")
        place = plain.get_submodule(module)._parameters
        before = place.get(own)
        if before is not None:  # else a buffer, which is not tied
            place[own] = fresh.setdefault(part, nn.Parameter(torch.empty_like(before), requires_grad=False))
    untied = untied_since(plain, ties)
    if untied:
        untie_config(plain)
    return untied
