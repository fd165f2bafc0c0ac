"""A model on the meta device, with its adapter: built without memory for W0, adapted, and filled from its files.

So for a model larger than memory each tensor of W0 is loaded only while it is needed. A tensor is read in blocks of
rows and cast, into memory for what this process holds: the whole tensor, or its shard where `fully_shard` or tensor
parallelism has made a DTensor of the parameter. Beside the filled model, memory is needed for two blocks, or for one
tensor that the files hold in pieces, such as a layer's experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError, first_few
from lora_lightning.lora.formats.tensor_files import INDEX, Checkpoint
from lora_lightning.lora.frozen.tensors import adapter_tensors, full_name
from lora_lightning.lora.init.from_data import refuse_data
from lora_lightning.lora.init.from_weight import is_from_weight
from lora_lightning.lora.inject import adapted_layers, grafted_modules, inject, remove
from lora_lightning.lora.layers import AdaptedLayer, Grafted, SavedCopy, TokenRows, TrainedBias
from lora_lightning.lora.meta.key_mapping import ATTRIBUTE, base_of, keep_files, names_by_tensor, swap_tensors
from lora_lightning.lora.report import InjectionReport


def builds_bare() -> bool:
    """Whether torch's default device is `meta`, so that models are built without weights."""
    return torch.get_default_device().type == "meta"


def on_meta(make: Callable[[], nn.Module], weights: str | Path) -> nn.Module:
    """The module that `make` builds, in eval mode, without memory for its parameters.

    Each parameter goes to the meta device when it is registered, so that at most one is in memory at a time. Buffers
    stay real, and those in the files are loaded at once.

    Args:
        make: a class or a function without arguments.
        weights: a safetensors file, or a folder of them in the hub's layout, with the module's names.

    Raises:
        LoRAError: no such file; or the files lack a parameter, have one of another shape, or have an unknown key.
    """
    with _parameters_on_meta():
        model = make()
    path = Path(weights)
    folder = path.parent if path.name == INDEX else path
    files = [folder / name for name in Checkpoint(folder).files] if folder.is_dir() else [path]
    stored, state = keep_files(model, files).stored, model.state_dict()
    problems = [f"no '{names[0]}'" for names in names_by_tensor(model) if stored.keys().isdisjoint(names)]
    for key, at in stored.items():
        if key not in state:
            problems.append(f"'{key}', which the module has not")
        elif at.shape != tuple(state[key].shape):
            problems.append(f"'{key}' of shape {at.shape} instead of {tuple(state[key].shape)}")
    if problems:
        raise LoRAError(f"{path} does not fit {type(model).__name__}: it has {first_few(problems)}")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.copy_(stored[name].read())
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter
    bare: Any = WeakIdKeyDictionary()  # so that a parameter registered twice stays one

    def without_numbers(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in bare:
                bare[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            parameter = bare[parameter]
        register(module, name, parameter)

    with patch.object(nn.Module, "register_parameter", without_numbers):
        yield


def adapted_names(path: str, layer: AdaptedLayer) -> dict[str, str]:
    """The names in the model of the weights that the layer at `path` adapts, by their keys in the module."""
    owner = path if layer.lora_owner is layer else layer.lora_name(path).rpartition(".")[0]
    return {key: full_name(owner, key) for key in layer.adapted_parameters()}


@torch.no_grad()
def start_from_present(layer: AdaptedLayer) -> None:
    """Compute (A0, B0) of an init from W0, whose values are present; the loaded tensors do not change."""
    if not is_from_weight(layer.lora_settings.init):
        return
    loaded = {name: tensor.clone() for name, tensor in layer.lora_tensors().items()}
    layer.reset_lora_parameters()
    for name, tensor in layer.lora_tensors().items():
        if name not in ("lora_A0", "lora_B0"):  # which are in no file
            tensor.copy_(loaded[name])


@torch.no_grad()
def make_adapter_real(model: nn.Module) -> None:
    """Allocate memory for the adapter's tensors that are on the meta device; tied ones stay tied."""
    empty = {key: tensor for key, tensor in adapter_tensors(model).items() if tensor.is_meta}
    real = {tensor: torch.zeros_like(tensor, device="cpu") for tensor in empty.values()}
    swap_tensors(model, {key: real[tensor] for key, tensor in empty.items()})


def inject_anywhere(model: nn.Module, config: LoRAConfig, *, run_init: bool = True) -> InjectionReport:
    """`inject`, also into a model on the meta device that knows its weight files.

    The adapter is complete at once: A is drawn from torch's generator in the same order, and what is computed from W0,
    such as DoRA's magnitudes, PiSSA's factors and the copies of `modules_to_save`, is computed from tensors of W0 that
    are read for the moment. W0 stays on the meta device until `fill_from_files`. Within `torch.device("meta")` there
    are no values, and an init from W0 is not run.
    """
    base = base_of(model)
    if base is None:
        return inject(model, config, run_init=run_init and not builds_bare())
    if run_init:
        refuse_data(config.init, None)
    report = inject(model, config, run_init=False)
    try:
        make_adapter_real(model)
        state = model.state_dict(keep_vars=True)
        dtypes = {name: tensor.dtype for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.is_meta}
        layers = {layer.lora_name(path): (path, layer) for path, layer in adapted_layers(model)}
        others = [(path, module) for path, module in grafted_modules(model) if not isinstance(module, AdaptedLayer)]
        for path, module in [*(layers[row.module] for row in report.modules), *others]:  # in the order of `inject`
            names = [name for name in _names_to_start(path, module) if name in dtypes]
            W0 = {name: tensor.to(dtypes[name]) for name in names if (tensor := base(name)) is not None}
            base.forget()
            if lost := [name for name in names if name not in W0]:
                raise LoRAError(f"'{lost[0]}' is on the meta device, and the model's files have no values for it")
            bare = swap_tensors(model, W0)
            try:
                module.reset_lora_parameters()
            finally:
                swap_tensors(model, bare)
    except BaseException:
        remove(model)
        raise
    return report


def _names_to_start(path: str, module: Grafted) -> list[str]:
    """Names of the tensors of W0 from which the adapter's tensors in a module are initialized."""
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
    return names


@torch.no_grad()
def fill_from_files(model: nn.Module, device: torch.device | str = "cpu") -> int:
    """Fill the tensors of `model` that are on the meta device; ties stay, and other tensors do not change.

    For a model that `huggingface(..., on_meta=True)` or `on_meta` built, before or after it was sharded. Returns the
    number of filled tensors, 0 where none is on the meta device.

    Args:
        device: of whole tensors; a shard is on its mesh's device.

    Raises:
        LoRAError: the model does not know its weight files, or they lack a tensor; the model is then unchanged.
    """
    empty: dict[Tensor, list[str]] = {}  # with the names of each in the model: several where it is tied
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in itertools.chain(*named):
        if tensor.is_meta:
            empty.setdefault(tensor, []).append(name)
    if not empty:
        return 0
    base = base_of(model)
    if base is None:
        raise LoRAError(
            f"'{next(iter(empty.values()))[0]}' is on the meta device, and it is not known where its weights lie: build"
            " the model by lora_lightning.huggingface(..., on_meta=True) or lora_lightning.on_meta"
        )
    if without := [names[0] for names in empty.values() if base.of_name.keys().isdisjoint(names)]:
        what = f"{len(without)} tensors of {type(model).__name__}"
        raise LoRAError(f"{base.checkpoint.directory} has no values for {what}: {first_few(without)}")
    sources = {next(name for name in names if name in base.of_name): tensor for tensor, names in empty.items()}
    filled: dict[Tensor, Tensor] = {}
    for name in sorted(sources, key=lambda name: (base.place(name).path, base.place(name).start)):
        tensor, got = sources[name], base.place(name).shape
        if base.of_name[name].is_alone and got != tuple(tensor.shape):
            here = f"{tuple(tensor.shape)} in the model"
            raise LoRAError(f"'{name}' has shape {got} in the files and {here}: they are of another config")
        filled[tensor], part, place = _allocate(tensor, device)
        rows, done = place[0] if place else slice(None), 0
        for block in base.blocks(name, rows):
            if not place:
                part.copy_(block)
                continue
            part[done : done + len(block)].copy_(block[:, *place[1:]])
            done += len(block)
    swap_tensors(model, {name: filled[tensor] for tensor, names in empty.items() for name in names})
    model.__dict__.pop(ATTRIBUTE, None)
    return len(filled)


def _allocate(tensor: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor, tuple[slice, ...]]:
    """A tensor like the one on the meta device, the part of it that this process holds, and the part's slices."""
    if type(tensor) in (Tensor, nn.Parameter):
        value = torch.empty_like(tensor, device=device)
        return value, value, tuple(map(slice, value.shape))
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        raise LoRAError(f"a {type(tensor).__name__} on the meta device cannot be filled from files: load it whole")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    sharded: DTensor = torch.empty_like(tensor, device=tensor.device_mesh.device_type)  # type: ignore[assignment]
    return sharded, sharded.to_local(), tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
