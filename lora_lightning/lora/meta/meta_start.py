"""Inject LoRA into a model on the meta device, with the adapter that it would have had with its weights in memory.

The adapter is real and complete at once: A is drawn from torch's generator in the same order, and what follows from W0,
as DoRA's magnitudes, PiSSA's factors and the copies of `modules_to_save` do, is computed from the tensor of W0 that it
takes, read for the moment. W0 itself stays away; `fill_from_files` brings it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.tensors import full_name
from lora_lightning.lora.init import from_weight as inits
from lora_lightning.lora.init.from_data import refuse_data
from lora_lightning.lora.inject import adapted_layers, grafted_modules, inject, remove
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy, TokenRows, TrainedBias
from lora_lightning.lora.meta.bare import builds_bare
from lora_lightning.lora.meta.inject import make_adapter_real, present
from lora_lightning.lora.meta.weight_files import files_of
from lora_lightning.lora.report import InjectionReport

Read = Callable[[str], Tensor | None]


def inject_anywhere(model: nn.Module, config: LoRAConfig, *, start: bool = True) -> InjectionReport:
    """`inject`, also into a model that knows where its weights lie and has them on the meta device.

    Within `torch.device("meta")` nothing has numbers, and a start that is computed from W0 is left out.
    """
    files = files_of(model)
    if files is None:
        return inject(model, config, start=start and not builds_bare())
    if start:
        refuse_data(config.init, None)
    read = files.reader(model)
    report = inject(model, config, start=False)
    try:
        make_adapter_real(model)
        _draw(model, report, read, start=start)
        _copy(model, read)
    except BaseException:
        remove(model)
        raise
    return report


def _draw(model: nn.Module, report: InjectionReport, read: Read, *, start: bool) -> None:
    """Start A, B and what options add, in the order in which `inject` does."""
    layers = {layer.lora_name(name): layer for name, layer in adapted_layers(model)}
    names = {module: name for name, module in model.named_modules()}
    for row in report.modules:
        layer = layers[row.module]
        with _w0_present(layer, names[layer.lora_owner], read, start=start):
            # Of the layer alone: a bias that trains beside it is copied below.
            AdaptedLayer.reset_lora_parameters(layer) if start else layer.init_plainly()


@contextmanager
def _w0_present(layer: AdaptedLayer, name: str, read: Read, *, start: bool) -> Iterator[None]:
    """The adapted tensors of W0 for the block, where the start depends on them."""
    follows = layer.lora_magnitude_vector is not None or (start and inits.is_from_weight(layer.lora_settings.init))
    parts = layer.adapted_parameters(layer.lora_owner, layer.lora_settings) if follows else {}
    tensors = {own: _needed(read, full_name(name, own)) for own, tensor in parts.items() if tensor.is_meta}
    with present(layer.lora_owner, tensors):
        yield


@torch.no_grad()
def _copy(model: nn.Module, read: Read) -> None:
    """What trains in place of tensors of W0 starts at these."""
    own, wanted = model.state_dict(keep_vars=True), dict[str, Tensor]()
    for name, module in grafted_modules(model, SavedCopy):
        inner = module.lora_copy.state_dict(keep_vars=True)
        wanted |= {full_name(name, key): tensor for key, tensor in inner.items() if isinstance(tensor, Tensor)}
    for name, biased in grafted_modules(model, TrainedBias):
        wanted[full_name(name, "bias")] = biased.lora_trained_bias
    for name, tensor in wanted.items():
        if own[name].is_meta:
            tensor.copy_(_needed(read, name))
    for name, rows in grafted_modules(model, TokenRows):
        if rows.weight.is_meta:
            rows.lora_tokens.copy_(_needed(read, full_name(name, "weight"))[rows.lora_token_ids])


def _needed(read: Read, name: str) -> Tensor:
    found = read(name)
    if found is None:
        raise LoRAError(f"'{name}' is on the meta device, and the model's files have no values for it")
    return found
