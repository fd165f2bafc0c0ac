"""`nn.MultiheadAttention`, whose projections are weights that it reads, not layers that it calls.

So an adapted projection is a weight that reads as `W0 + s B A`; W0 stays where it is, under its name. All code that
computes with the weight, torch's fused kernels too, sees the update once. `nn.TransformerEncoderLayer` and
`nn.TransformerEncoder` have kernels that read the weights of layers instead of calling them: those kernels are switched
off where such a layer is adapted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_lightning.lora.config import LayerSettings
from lora_lightning.lora.layers.base import WHOLE, AdaptedLayer
from lora_lightning.lora.layers.class_swap import Grafted, graft, own_forward_calls_super
from lora_lightning.lora.layers.functional import block_rows, lora_delta, unblock_rows
from lora_lightning.lora.layers.linear import LoRALinear
from lora_lightning.lora.targets.fused_projections import Slices

PARTS = ("q", "k", "v")
IN_PROJ = "in_proj_weight"
OutProj = NonDynamicallyQuantizableLinear
"""The class of `out_proj`, and of no other layer."""


class ReadWeight(AdaptedLayer):
    """An adapted layer whose weights other code reads as `W0 + s B A`, computed at each read."""

    has_input = False

    @classmethod
    def read_names(cls, module: nn.Module, settings: LayerSettings) -> tuple[str, ...]:
        return tuple(cls.adapted_parameters(module, settings))

    def lora_read(self, name: str) -> Tensor:
        weight = self._parameters[name]
        assert weight is not None
        is_adapted = self.lora_enabled and "lora_settings" in self.__dict__
        return self.updated_weights()[name].to(weight.dtype) if is_adapted else weight

    def base_weight(self) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight


class LoRAOutProj(ReadWeight, LoRALinear):
    """The `out_proj` of `nn.MultiheadAttention`, an `nn.Linear` that is never called."""

    has_lora_bias = False

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """As `nn.Linear`, for code that calls it after all: the weight reads as the adapted one."""
        return nn.Linear.forward(self, input)


class LoRAMultiheadAttention(ReadWeight, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with in_proj adapted.

    Adapted as one weight, as PEFT does: q, k and v share A (r, width), and B is (3 width, r). With chosen parts, or
    with `kdim` or `vdim`, each part has its own factors: A is (r, the parts' inputs side by side) and B (the parts'
    rows, r).
    """

    kind = "MultiheadAttention"
    linear_like = True

    @classmethod
    def output_rows(cls, module: nn.Module) -> int:
        """Outputs of the in-projection."""
        return 3 * int(_as_attention(module).embed_dim)

    @classmethod
    def factor_shapes(cls, module: nn.Module, settings: LayerSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
        width, taken = _as_attention(module).embed_dim, _separate_parts(module, settings)
        if taken is None:
            return (settings.r, width), (3 * width, settings.r)
        inputs = sum(_input_widths(module)[part] for part in taken)
        return (settings.r, inputs), (len(taken) * width, settings.r)

    @classmethod
    def largest_rank(cls, module: nn.Module, settings: LayerSettings) -> int:
        taken = _separate_parts(module, settings) or PARTS
        return min(int(_as_attention(module).embed_dim), *(_input_widths(module)[part] for part in taken))

    @classmethod
    def adapted_parameters(cls, module: nn.Module, settings: LayerSettings) -> dict[str, nn.Parameter]:
        parts = _separate_parts(module, settings) or PARTS
        names = [IN_PROJ] if _has_one_weight(module) else [f"{part}_proj_weight" for part in parts]
        return {name: module._parameters[name] for name in names}  # type: ignore[misc]

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (width, r) of each adapted part."""
        taken = _separate_parts(self, self.lora_settings)
        if taken is None:
            return dict(zip(PARTS, ((self.lora_A, B) for B in self.lora_B.chunk(3)), strict=True))
        inputs = torch.split(self.lora_A, [_input_widths(self)[part] for part in taken], dim=1)
        return dict(zip(taken, zip(inputs, torch.split(self.lora_B, self.embed_dim), strict=True), strict=True))

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        is_shared = _separate_parts(self, self.lora_settings) is None
        return super().factor_pairs() if is_shared else list(self._pairs().values())

    def updates(self) -> Iterator[tuple[str, tuple[slice, ...], Tensor, Tensor]]:
        dtype, scale = self._lora_dtype(), self.lora_settings.scale
        if _has_one_weight(self):
            factors = self.to_peft()
            deltas = {IN_PROJ: lora_delta(factors["lora_A"], factors["lora_B"], scale, dtype)}
        else:
            deltas = {f"{part}_proj_weight": lora_delta(A, B, scale, dtype) for part, (A, B) in self._pairs().items()}
        for name, weight in self.adapted_parameters(self, self.lora_settings).items():
            yield name, (), weight.to(dtype), deltas[name]

    def delta_weight(self, part: slice = WHOLE) -> Tensor:
        """The updates of q, k and v, one above the other; only where they are one weight."""
        ((_, _, _, delta),) = self.updates()
        return delta

    def peft_rank(self) -> int:
        return self.lora_settings.r * (len(self._pairs()) if self._slices() else 1)

    def _slices(self) -> Slices | None:
        """The layout where parts of one weight have separate factors. PEFT has no form for three weights."""
        return self.lora_settings.slices if _has_one_weight(self) else None

    def to_peft(self) -> dict[str, Tensor]:
        slices = self._slices()
        if slices is None:
            return super().to_peft()
        A = torch.cat(torch.split(self.lora_A, self.embed_dim, dim=1))
        return {**super().to_peft(), "lora_A": A, "lora_B": block_rows(self.lora_B, slices)}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        slices = self._slices()
        if slices is None:
            return dict(tensors)
        A = torch.cat(torch.split(tensors["lora_A"], self.lora_settings.r), dim=1)
        return {**tensors, "lora_A": A, "lora_B": unblock_rows(tensors["lora_B"], slices)}


def _has_one_weight(module: nn.Module) -> bool:
    """Whether q, k and v are one weight."""
    return module._parameters.get(IN_PROJ) is not None


def _separate_parts(module: nn.Module, settings: LayerSettings) -> tuple[str, ...] | None:
    """The parts that each have an A; None where q, k and v share one."""
    if settings.slices is not None:
        return settings.slices.taken
    return None if _has_one_weight(module) else PARTS


def _input_widths(module: nn.Module) -> dict[str, int]:
    attention = _as_attention(module)
    return {"q": attention.embed_dim, "k": attention.kdim, "v": attention.vdim}


def _as_attention(module: nn.Module) -> nn.MultiheadAttention:
    assert isinstance(module, nn.MultiheadAttention)
    return module


def _switched_attribute(name: str, value: int) -> property:
    """An attribute that reads as `value` while the adapter is on, and as the module's value while it is off."""

    def read(module: Any) -> Any:
        return value if module.lora_enabled else module.__dict__[name]

    return property(read, lambda module, stored: module.__dict__.update({name: stored}))


class EncoderLayerHost(Grafted, nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` that calls its layers: torch's fused kernel needs an activation other than 0."""

    activation_relu_or_gelu = _switched_attribute("activation_relu_or_gelu", 0)  # type: ignore[assignment]


class EncoderHost(Grafted, nn.TransformerEncoder):
    """`nn.TransformerEncoder` without nested tensors for padded batches, which only its layers' kernels can read."""

    use_nested_tensor = _switched_attribute("use_nested_tensor", False)  # type: ignore[assignment]


def hold_kernels_off(modules: list[nn.Module], adapted: list[nn.Module]) -> None:
    """Make torch's encoders call the adapted or saved modules inside them.

    An adapted attention needs no call: its weights read as the updated ones.
    """
    called = {m for m in adapted if not isinstance(m, nn.MultiheadAttention | OutProj)}
    for module in modules:
        for kind, host in ((nn.TransformerEncoderLayer, EncoderLayerHost), (nn.TransformerEncoder, EncoderHost)):
            # A subclass whose forward replaces torch's does not reach its kernels.
            is_torchs = isinstance(module, kind) and own_forward_calls_super(type(module), kind)
            if is_torchs and called.intersection(module.modules()) - {module}:
                graft(module, host)
