"""An adapter on a model that has no weights: everything of the adapter is real, everything of W0 on the meta device.

So a model larger than memory is known by its modules, and each of its tensors is put in only for the moment in which
it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, ConfigError, TargetError
from lora_lightning.lora.formats.peft.adapter import load_tensors, of_model, read_directory
from lora_lightning.lora.formats.peft.config import token_ids
from lora_lightning.lora.formats.peft.copies import without_base_copies
from lora_lightning.lora.formats.peft.packing import PREFIX, our_tensors
from lora_lightning.lora.formats.peft.unpacking import check_targets, contents, our_config
from lora_lightning.lora.formats.peft.wrappers import unwrapped
from lora_lightning.lora.formats.provenance import Record
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.init import from_weight as starts
from lora_lightning.lora.inject import adapted_layers, grafted_modules, inject
from lora_lightning.lora.layers import AdaptedLayer, TokenRows

Read = Callable[[str], Tensor | None]
"""W0's tensor of a name in the model, None where the files have none."""


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """What an adapter's directory holds, read once."""

    directory: Path
    peft: dict[str, Any]
    """PEFT's config."""
    tensors: dict[str, Tensor]
    """As they lie in the file."""
    record: Record | None

    @classmethod
    def read(cls, directory: Path) -> AdapterFiles:
        """As `load_adapter` reads it, old pickles included.

        Raises:
            AdapterError: a file is missing, torn or was changed since it was saved.
        """
        peft, tensors, record = read_directory(directory)
        return cls(directory=directory, peft=peft, tensors=tensors, record=record)


def load_on_meta(
    model: nn.Module,
    files: AdapterFiles,
    read: Read,
    *,
    allow_other_base: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> None:
    """Like `load_adapter`, for a `model` on the meta device; the fingerprint of W0 is the caller's to check.

    Raises:
        AdapterError: as `load_adapter`.
    """
    peft, tensors = of_model(files.peft, files.tensors, model)
    tensors = _less_base_copies(tensors, peft, model, read, allow_other_base=allow_other_base)
    found = contents(tensors, peft, model)
    check_targets(peft, found, model)
    try:
        inject(model, our_config(peft, found, files.record, model, alphas or {}), start=False, any_rank=True)
    except (ConfigError, TargetError) as error:
        raise AdapterError(f"the adapter in {files.directory} does not fit this model: {error}") from error
    make_adapter_real(model)
    first = {f"{n}.{o}": t for n, m in adapted_layers(model) for o, t in m.lora_tensors().items() if o in _FIRST}
    load_tensors(model, {**first, **our_tensors(model, tensors, lambda name: token_ids(peft, name))})


_FIRST = ("lora_A0", "lora_B0")
"""The factors that no file holds: they follow from W0."""


@contextmanager
def present(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, `module` holds these tensors as its parameters of these names."""
    before = {name: module._parameters[name] for name in tensors}
    try:
        module._parameters.update({n: nn.Parameter(tensor, requires_grad=False) for n, tensor in tensors.items()})
        yield
    finally:
        module._parameters.update(before)


@torch.no_grad()
def start_from_present(layer: AdaptedLayer) -> None:
    """Compute the start (A0, B0) that W0 alone decides, from the W0 that is present; what was loaded stays."""
    if not starts.from_weight(layer.lora_settings.init):
        return
    loaded = {name: tensor.clone() for name, tensor in layer.lora_tensors().items() if name not in _FIRST}
    layer.reset_lora_parameters()
    own = layer.lora_tensors()
    for name, tensor in loaded.items():
        own[name].copy_(tensor)


def _less_base_copies(
    tensors: Mapping[str, Tensor], peft: dict[str, Any], model: nn.Module, read: Read, *, allow_other_base: bool
) -> dict[str, Tensor]:
    """`without_base_copies`, with each tensor of W0 that it compares put in for the moment."""
    names, modules = set(model.state_dict()), dict(model.named_modules(remove_duplicate=False))
    kept: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, own = (name := unwrapped(key.removeprefix(PREFIX), modules)[0]).rpartition(".")
        W0 = read(name) if name in names and own in model.get_submodule(module)._parameters else None
        if W0 is None:
            kept[key] = tensor
            continue
        with present(model.get_submodule(module), {own: W0}):
            kept |= without_base_copies({key: tensor}, peft, model, allow_other_base=allow_other_base)
    return kept


@torch.no_grad()
def make_adapter_real(model: nn.Module) -> None:
    """Give the adapter's tensors on the meta device memory of their own; what is tied among them stays tied."""
    real: dict[int, Tensor] = {}
    for key, tensor in adapter_tensors(model).items():
        if not tensor.is_meta:
            continue
        module, _, name = key.rpartition(".")
        owner = model.get_submodule(module)
        if id(tensor) not in real:
            empty = torch.zeros_like(tensor, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            real[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        (owner._parameters if name in owner._parameters else owner._buffers)[name] = real[id(tensor)]  # type: ignore[assignment]
    for _, rows in grafted_modules(model, TokenRows):
        rows.lora_token_ids = torch.tensor(rows.__dict__["lora_token_numbers"])
