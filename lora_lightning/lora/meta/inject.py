"""An adapter on a model that has no weights: everything of the adapter is real, everything of W0 on the meta device.

So a model larger than memory is known by its modules, and each of its tensors is put in only for the moment in which
it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.lora.formats.peft.load import AdapterFiles, load_files
from lora_lightning.lora.formats.peft.resolve import Read
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.init import from_weight as inits
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import AdaptedLayer, TokenRows


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
    load_files(model, files, read=read, make_real=make_adapter_real, allow_other_base=allow_other_base, alphas=alphas)


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
    if not inits.is_from_weight(layer.lora_settings.init):
        return
    loaded = {
        name: tensor.clone() for name, tensor in layer.lora_tensors().items() if name not in ("lora_A0", "lora_B0")
    }
    layer.reset_lora_parameters()
    own = layer.lora_tensors()
    for name, tensor in loaded.items():
        own[name].copy_(tensor)


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
