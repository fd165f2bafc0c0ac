"""Which options a layer can take, and the refusals of those that it cannot."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.init import from_weight as starts
from lora_lightning.lora.layers import AdaptedLayer, LayerSettings


def refuse_options(name: str, module: nn.Module, kind: type[AdaptedLayer], settings: LayerSettings) -> None:
    """Check DoRA, `lora_bias` and the start against one module.

    Raises:
        TargetError: this kind of layer has no such form, by the module's name.
    """
    init, r = settings.init, settings.r
    starts_elsewhere = starts.from_weight(init) or init in starts.DATA_STARTS
    what = f"a {type(module).__name__}" if not settings.parameter else "a bare parameter"
    if settings.slices and (settings.use_dora or settings.lora_bias or starts_elsewhere):
        option = "use_dora" if settings.use_dora else "lora_bias" if settings.lora_bias else f"init '{init}'"
        raise TargetError(f"{option} has no form for chosen slices yet, and '{name}' has some: leave one of them out")
    if settings.use_dora and kind.dora_dim is None:
        raise TargetError(f"use_dora: '{name}', {what}, has no DoRA form: exclude it or switch it off")
    if settings.lora_bias and not kind.has_lora_bias:
        raise TargetError(f"lora_bias: '{name}', {what}, takes no bias on B: exclude it")
    if not starts_elsewhere:
        return
    if not kind.has_starts:
        raise TargetError(
            f"init '{init}' is made for linear layers; '{name}' is {what}: exclude it, or use init 'gaussian'"
        )
    if init == "loftq" and scheme(module) is None:
        raise TargetError(
            f"init 'loftq' takes back what quantisation lost, and '{name}', {what},"
            f" is not quantised: load the base in 4 or 8 bits, or use init 'pissa'"
        )
    shape_a, shape_b = kind.factor_shapes(module, settings)
    if reason := starts.why_not(init, r, (shape_b[0], shape_a[1])):
        raise TargetError(f"{reason} (module '{name}')")
