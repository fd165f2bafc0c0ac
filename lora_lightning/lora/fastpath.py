"""torch's fused encoder kernel reads `.weight` and would bypass an adapter; here it is kept from being taken.

`nn.TransformerEncoderLayer.forward` in eval mode hands its weights to one fused kernel. It does not do so
while a forward hook sits on any module inside it, which is torch's own rule for observed layers, so a hook that
does nothing is the switch. `nn.TransformerEncoder` packs padded batches into nested tensors for that same
kernel, and must not while its layers run unfused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_HOOK = "_lora_fast_path_hook"
_NESTED = "_lora_use_nested_tensor"


def keep_off(model: nn.Module, adapted: list[nn.Module]) -> None:
    """Hold the fused kernel off in every encoder layer that holds an adapted module."""
    inside = set(adapted)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and inside.intersection(module.modules()):
            setattr(module, _HOOK, module.register_forward_pre_hook(_nothing))
        if isinstance(module, nn.TransformerEncoder) and inside.intersection(module.modules()):
            setattr(module, _NESTED, module.use_nested_tensor)
            module.use_nested_tensor = False


def allow(model: nn.Module) -> None:
    """Undo `keep_off`."""
    for module in model.modules():
        if _HOOK in module.__dict__:
            module.__dict__.pop(_HOOK).remove()
        if _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)


def _nothing(module: nn.Module, args: Any) -> None:
    return None
