"""An adapter on a model without weights: the adapter's tensors are real, and W0 is on the meta device.

So for a model larger than memory, each tensor of W0 is loaded only while it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.tensors import adapter_tensors, full_name
from lora_lightning.lora.init.from_data import refuse_data
from lora_lightning.lora.init.from_weight import is_from_weight
from lora_lightning.lora.inject import adapted_layers, grafted_modules, inject, remove
from lora_lightning.lora.layers import AdaptedLayer, Grafted, SavedCopy, TokenRows, TrainedBias
from lora_lightning.lora.meta.build import builds_bare
from lora_lightning.lora.meta.key_mapping import files_of
from lora_lightning.lora.report import InjectionReport

OF_W0 = ("lora_A0", "lora_B0")
"""The factors that are in no file, since they are computed from W0."""


@contextmanager
def hold_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, `model` has these tensors under these names, in place of those on the meta device."""
    places = {name: place_of(model, name) for name in tensors}
    before = [(store, key, store[key]) for store, key in places.values()]
    try:
        for name, (store, key) in places.items():
            is_parameter = isinstance(store[key], nn.Parameter)
            store[key] = nn.Parameter(tensors[name], requires_grad=False) if is_parameter else tensors[name]
        yield
    finally:
        for store, key, tensor in before:
            store[key] = tensor


def place_of(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary of the module that holds a tensor of the model, and its key there."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return module._parameters if key in module._parameters else module._buffers, key


def adapted_names(path: str, layer: AdaptedLayer) -> dict[str, str]:
    """The names in the model of the weights that the layer at `path` adapts, by their keys in the module."""
    owner = path if layer.lora_owner is layer else layer.lora_name(path).rpartition(".")[0]
    return {key: full_name(owner, key) for key in layer.adapted_parameters(layer.lora_owner, layer.lora_settings)}


@torch.no_grad()
def start_from_present(layer: AdaptedLayer) -> None:
    """Compute (A0, B0) of an init from W0, whose values are present; the loaded tensors do not change."""
    if not is_from_weight(layer.lora_settings.init):
        return
    loaded = {name: tensor.clone() for name, tensor in layer.lora_tensors().items() if name not in OF_W0}
    layer.reset_lora_parameters()
    current = layer.lora_tensors()
    for name, tensor in loaded.items():
        current[name].copy_(tensor)


@torch.no_grad()
def make_adapter_real(model: nn.Module) -> None:
    """Allocate memory for the adapter's tensors that are on the meta device; tied ones stay tied."""
    real: dict[int, Tensor] = {}
    for key, tensor in adapter_tensors(model).items():
        if not tensor.is_meta:
            continue
        store, name = place_of(model, key)
        if id(tensor) not in real:
            empty = torch.zeros_like(tensor, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            real[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        store[name] = real[id(tensor)]


def inject_anywhere(model: nn.Module, config: LoRAConfig, *, run_init: bool = True) -> InjectionReport:
    """`inject`, also into a model on the meta device that knows its weight files.

    The adapter is complete at once: A is drawn from torch's generator in the same order, and what is computed from W0,
    such as DoRA's magnitudes, PiSSA's factors and the copies of `modules_to_save`, is computed from tensors of W0 that
    are read for the moment. W0 stays on the meta device until `fill_from_files`. Within `torch.device("meta")` there
    are no values, and an init from W0 is not run.
    """
    files = files_of(model)
    if files is None:
        return inject(model, config, run_init=run_init and not builds_bare())
    if run_init:
        refuse_data(config.init, None)
    read = files.reader(model)
    report = inject(model, config, run_init=False)
    try:
        make_adapter_real(model)
        layers = {layer.lora_name(path): (path, layer) for path, layer in adapted_layers(model)}
        others = [(path, module) for path, module in grafted_modules(model) if not isinstance(module, AdaptedLayer)]
        for path, module in [*(layers[row.module] for row in report.modules), *others]:  # in the order of `inject`
            W0 = {name: read(name) for name in _names_to_start(model, path, module)}
            if lost := [name for name, tensor in W0.items() if tensor is None]:
                raise LoRAError(f"'{lost[0]}' is on the meta device, and the model's files have no values for it")
            with hold_tensors(model, {name: tensor for name, tensor in W0.items() if tensor is not None}):
                module.reset_lora_parameters()
    except BaseException:
        remove(model)
        raise
    return report


def _names_to_start(model: nn.Module, path: str, module: Grafted) -> list[str]:
    """Names of the tensors of W0 on the meta device from which the adapter's tensors in a module are initialized."""
    names: list[str] = []
    if isinstance(module, AdaptedLayer):
        follows = module.lora_magnitude_vector is not None or is_from_weight(module.lora_settings.init)
        names += adapted_names(path, module).values() if follows else []
    if isinstance(module, TrainedBias):
        names.append(full_name(path, "bias"))
    if isinstance(module, TokenRows):
        names.append(full_name(path, "weight"))
    if isinstance(module, SavedCopy):
        names += [full_name(path, key) for key in module.lora_copy.state_dict()]
    return [name for name in names if (place := place_of(model, name))[0][place[1]].is_meta]
