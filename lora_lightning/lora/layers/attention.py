"""`nn.MultiheadAttention`, whose projections are weights that it reads, not layers that it calls.

So an adapted projection is a weight that reads as `W0 + s B A`; W0 stays where it is, under its name. All code that
computes with the weight, torch's fused kernels too, sees the update once. `nn.TransformerEncoderLayer` and
`nn.TransformerEncoder` have kernels that read the weights of layers instead of calling them: those kernels are switched
off where such a layer is adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_lightning.lora.config import LayerSettings
from lora_lightning.lora.layers.base import WHOLE, Layout
from lora_lightning.lora.layers.class_swap import Grafted, graft, own_forward_calls_super
from lora_lightning.lora.layers.functional import lora_delta
from lora_lightning.lora.layers.linear import LoRALinear, Projection
from lora_lightning.lora.targets.fused_projections import Slices

PARTS = ("q", "k", "v")
IN_PROJ = "in_proj_weight"
OutProj = NonDynamicallyQuantizableLinear
"""The class of `out_proj`, and of no other layer."""


class LoRAOutProj(LoRALinear):
    """The `out_proj` of `nn.MultiheadAttention`, an `nn.Linear` that is never called."""

    has_input = has_lora_bias = False

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """As `nn.Linear`, for code that calls it after all: the weight reads as the adapted one."""
        return nn.Linear.forward(self, input)


class LoRAMultiheadAttention(Projection, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with in_proj adapted.

    Adapted as one weight, as PEFT does: q, k and v share A (r, width), and B is (3 width, r). With chosen parts, or
    with `kdim` or `vdim`, each part has its own factors: A is (r, the parts' inputs side by side) and B (the parts'
    rows, r).
    """

    kind = "MultiheadAttention"
    has_input = False

    @classmethod
    def layout(cls, module: Any, settings: LayerSettings) -> Layout:
        r, width, parts = settings.r, module.embed_dim, _separate_parts(module, settings)
        inputs = [width] if parts is None else list(parts.values())
        weights = [IN_PROJ] if _has_one_weight(module) else [f"{part}_proj_weight" for part in parts or ()]
        outputs = (3 if parts is None else len(parts)) * width
        return Layout((r, sum(inputs)), (outputs, r), min(width, *inputs), tuple(weights))

    def _slices(self) -> Slices | None:
        """The layout where parts of one weight have separate factors. PEFT has no form for three weights."""
        return super()._slices() if _has_one_weight(self) else None

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        parts = _separate_parts(self, self.lora_settings)
        if parts is None:
            return [(self.lora_A, self.lora_B)]
        inputs = torch.split(self.lora_A, list(parts.values()), dim=1)
        return list(zip(inputs, torch.split(self.lora_B, self.embed_dim), strict=True))

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().lora_factors()
        return (A, B) if self._slices() is None else (torch.cat([A for A, _ in self.factor_pairs()]), B)

    def delta_weight(self, part: slice = WHOLE, name: str = IN_PROJ) -> Tensor:
        if _has_one_weight(self):
            return super().delta_weight()
        parts = _separate_parts(self, self.lora_settings) or {}
        A, B = self.factor_pairs()[[*parts].index(name[0])]
        return lora_delta(A, B, self.lora_settings.scale, self._lora_dtype())

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        A = tensors["lora_A"]
        is_stacked = self._slices() is not None
        beside = torch.cat(torch.split(A, self.lora_settings.r), dim=1) if is_stacked else A
        return {**super().from_peft(tensors), "lora_A": beside}


def _has_one_weight(module: nn.Module) -> bool:
    """Whether q, k and v are one weight."""
    return module._parameters.get(IN_PROJ) is not None


def _separate_parts(module: Any, settings: LayerSettings) -> dict[str, int] | None:
    """The inputs of each part that has an A of its own; None where q, k and v share one."""
    if settings.slices is None and _has_one_weight(module):
        return None
    widths = dict(zip(PARTS, (module.embed_dim, module.kdim, module.vdim), strict=True))
    return {part: widths[part] for part in (settings.slices.taken if settings.slices else PARTS)}


def _switched_attribute(name: str, value: int) -> property:
    """An attribute that reads as `value` while the adapter is on, and as the module's value while it is off."""

    def read(module: Any) -> Any:
        return value if module.lora_enabled else module.__dict__[name]

    return property(read, lambda module, stored: module.__dict__.update({name: stored}))


class EncoderHost(Grafted):
    """`nn.TransformerEncoder` or its layer, without the kernels that read weights instead of calling modules.

    A layer's kernel needs an activation other than 0; an encoder makes nested tensors of padded batches for it.
    """

    activation_relu_or_gelu = _switched_attribute("activation_relu_or_gelu", 0)
    use_nested_tensor = _switched_attribute("use_nested_tensor", False)


def hold_kernels_off(modules: list[nn.Module], adapted: list[nn.Module]) -> None:
    """Make torch's encoders call the adapted or saved modules inside them.

    An adapted attention needs no call: its weights read as the updated ones.
    """
    called = {m for m in adapted if not isinstance(m, nn.MultiheadAttention | OutProj)}
    for module in modules:
        for kind in (nn.TransformerEncoderLayer, nn.TransformerEncoder):
            # A subclass whose forward replaces torch's does not reach its kernels.
            is_torchs = isinstance(module, kind) and own_forward_calls_super(type(module), kind)
            if is_torchs and called.intersection(module.modules()) - {module}:
                graft(module, EncoderHost)
