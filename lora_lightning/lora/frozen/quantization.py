"""Quantized base layers: a module's scheme, and its dequantized weight.

Layers are recognized by the qualified name of their class, so that neither bitsandbytes nor torchao is imported here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _bnb_4bit(module: nn.Module) -> Tensor:
    weight, state = module.weight, _quant_state(module)
    assert isinstance(weight, Tensor)
    if state is None:
        return weight.data  # it is quantized when it is moved to a device
    functional = importlib.import_module("bitsandbytes.functional")
    dense: Tensor = functional.dequantize_4bit(weight.data, state)
    return dense


def _quant_state(module: nn.Module) -> Any:
    return vars(module.weight).get("quant_state")


def _bnb_8bit(module: nn.Module) -> Tensor:
    # The row scales are on the weight until the first forward moves them into the state. 127 is int8's largest value.
    weight, state = module.weight, module.state
    scales: Tensor = weight.SCB if weight.SCB is not None else state.SCB  # type: ignore[union-attr,assignment]
    return weight.data.float() * (scales.float() / 127.0).unsqueeze(1)  # type: ignore[union-attr,operator]


def _torchao(module: Any) -> Tensor:
    return module.weight.dequantize()  # type: ignore[no-any-return]


_BNB_4BIT = "bitsandbytes.nn.modules.Linear4bit"
_BNB: dict[str, tuple[str, Callable[[nn.Module], Tensor]]] = {
    _BNB_4BIT: ("bitsandbytes 4-bit", _bnb_4bit),
    "bitsandbytes.nn.modules.Linear8bitLt": ("bitsandbytes 8-bit", _bnb_8bit),
}

# Attributes of bitsandbytes' modules that nn.Linear does not have.
_BNB_ATTRIBUTES = (
    "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu",
    "state", "index",
)  # fmt: skip


def _find(module: nn.Module) -> tuple[str, Callable[[nn.Module], Tensor]] | None:
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return None  # the usual case, first: DoRA calls this in each forward, and torch.compile cannot trace the rest
    if (path := _bnb_class(module)) is not None:
        return _BNB[path]
    return ("torchao", _torchao) if _torchao_weight(module) else None


def _bnb_class(module: nn.Module) -> str | None:
    paths = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((path for path in paths if path in _BNB), None)


def _torchao_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and any(cls.__module__.startswith("torchao.") for cls in type(weight).__mro__)


def scheme(module: nn.Module) -> str | None:
    """The name of a module's quantization; None where its weight is plain."""
    return library[0] if (library := _find(module)) else None


_PACKING, _HELD = "support_avx512bf16_for_cpu", "_lora_packing"


def hold_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for the CPU in eval mode, and unpack those that are packed.

    Packing rounds the scales of W0 to bfloat16 and is not exactly reversible; and a packed weight has no backward, so
    that training after a validation would silently compute no gradient.
    """
    for module in model.modules():
        # Older versions do not repack.
        if _HELD not in module.__dict__ and _PACKING in module.__dict__ and _bnb_class(module) == _BNB_4BIT:
            state = _quant_state(module)
            if state is not None and vars(state).get("packing_format_for_cpu"):
                module.state_dict()  # which unpacks the weight
            module.__dict__[_HELD] = module.__dict__[_PACKING]
            module.__dict__[_PACKING] = False


def allow_packing(model: nn.Module) -> None:
    """Undo `hold_packing`."""
    for module in model.modules():
        if _HELD in module.__dict__:
            held = module.__dict__.pop(_HELD)
            if _bnb_class(module) == _BNB_4BIT:
                module.__dict__[_PACKING] = held


@torch.no_grad()
def plain_weight(module: nn.Module) -> Tensor:
    """W0, dequantized where it is quantized."""
    library = _find(module)
    stored = module._parameters.get("weight")  # of an adapted attention `.weight` reads as W0 + s B A
    weight = module.weight if stored is None else stored
    assert isinstance(weight, Tensor)
    return library[1](module) if library else weight


def make_plain(module: nn.Module, weight: Tensor) -> None:
    """Turn a quantized linear into an `nn.Linear` with this weight, in place."""
    if _bnb_class(module) is not None:
        module.__class__ = nn.Linear
        for name in _BNB_ATTRIBUTES:
            module.__dict__.pop(name, None)
        hooks = module._load_state_dict_pre_hooks
        # torch wraps a hook in an object with the attribute `hook`.
        for key in [k for k, hook in hooks.items() if vars(hook)["hook"].__module__.startswith("bitsandbytes.")]:
            del hooks[key]
    if _torchao_weight(module):
        module.__dict__.pop("extra_repr", None)  # torchao's, which describes its tensor
    del module._parameters["weight"]
    # The weight comes first in a linear's state dict.
    rest = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update(weight=nn.Parameter(weight, requires_grad=False), **rest)
