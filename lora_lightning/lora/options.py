"""Which options a layer can take, and the refusals of those that it cannot."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora import starts
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.layers import AdaptedLayer
from lora_lightning.lora.quantised import scheme


def refuse_options(name: str, module: nn.Module, kind: type[AdaptedLayer], config: LoRAConfig, r: int) -> None:
    """Check DoRA, `lora_bias` and the start against one module.

    Raises:
        TargetError: this kind of layer has no such form, by the module's name.
    """
    if config.use_dora and kind.dora_dim is None:
        raise TargetError(
            f"use_dora: '{name}', a {type(module).__name__}, has no DoRA form: exclude it or switch it off"
        )
    if config.lora_bias and not kind.has_lora_bias:
        raise TargetError(f"lora_bias: '{name}', a {type(module).__name__}, takes no bias on B: exclude it")
    if not (starts.from_weight(config.init) or config.init in starts.DATA_STARTS):
        return
    if not kind.has_starts:
        raise TargetError(
            f"init '{config.init}' is made for linear layers; '{name}' is a {type(module).__name__}:"
            f" exclude it, or use init 'gaussian'"
        )
    if config.init == "loftq" and scheme(module) is None:
        raise TargetError(
            f"init 'loftq' takes back what quantisation lost, and '{name}', a {type(module).__name__},"
            f" is not quantised: load the base in 4 or 8 bits, or use init 'pissa'"
        )
    shape_a, shape_b = kind.factor_shapes(module, r)
    reason = starts.why_not(config.init, r, (shape_b[0], shape_a[1]))
    if reason:
        raise TargetError(f"{reason} (module '{name}')")
