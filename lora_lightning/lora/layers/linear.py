"""`nn.Linear` and its subclasses, and transformers' `Conv1D`, a linear layer with a transposed weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LayerSettings
from lora_lightning.lora.layers.base import WHOLE, AdaptedLayer, Layout
from lora_lightning.lora.layers.class_swap import own_class
from lora_lightning.lora.layers.functional import block_rows, lora_delta, lora_update, subtracted_factors, unblock_rows
from lora_lightning.lora.layers.fused_linear import can_fuse, drops_by_bytes, fused_linear
from lora_lightning.lora.layers.own_forward import is_plain_linear
from lora_lightning.lora.layers.trained.bias import TrainedBias
from lora_lightning.lora.targets.fused_projections import Slices

CONV1D = "transformers.pytorch_utils.Conv1D"
"""Compared by name: `lora/` does not import transformers."""


@functools.cache
def _has_torchs_forward(cls: type) -> bool:
    """Whether the base layer's forward is torch's or transformers', and `weight` and `bias` are no properties."""
    original = own_class(cls)
    is_known = original.forward is nn.Linear.forward or f"{original.__module__}.{original.__qualname__}" == CONV1D
    bases = [base for base in cls.__mro__ if base is not TrainedBias]  # `forward` reads its property
    return is_known and not any(name in vars(base) for base in bases for name in ("weight", "bias"))


class Projection(AdaptedLayer):
    """A weight (out, in) with A (r, in) and B (out, r).

    With chosen parts of a fused weight (`slices`), A is (parts r, in) and B (the parts' rows, r).
    """

    linear_like = True
    weight_is_transposed = False

    def _slices(self) -> Slices | None:
        """The layout of the weight where chosen parts of it have factors of their own."""
        return self.lora_settings.slices

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        slices = self._slices()
        if slices is None:
            return super().factor_pairs()
        split = torch.split(self.lora_A, self.lora_settings.r), torch.split(self.lora_B, slices.taken_rows)
        return list(zip(*split, strict=True))

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) whose product is the update: r is larger with chosen parts or a subtracted init."""
        A, B, slices = self.lora_A, self.lora_B, self._slices()
        if slices is not None:
            return A, block_rows(B, slices)
        return (
            (A, B)
            if self.lora_A0 is None or self.lora_B0 is None
            else subtracted_factors(A, B, self.lora_A0, self.lora_B0)
        )

    def delta_weight(self, part: slice = WHOLE, name: str = "weight") -> Tensor:
        """In W0's orientation; parts are of the outputs."""
        A, B = self.lora_factors()
        delta = lora_delta(A, B[part], self.lora_settings.scale, self._lora_dtype())
        return delta.mT if self.weight_is_transposed else delta

    def base_matrix(self) -> Tensor:
        return self.base_weight().mT if self.weight_is_transposed else self.base_weight()

    def peft_rank(self) -> int:
        """PEFT has no parts: there chosen parts are one adapter, whose rank is the sum of theirs."""
        slices = self._slices()
        return self.lora_settings.r * (1 if slices is None else len(slices.taken))

    def to_peft(self) -> dict[str, Tensor]:
        if self._slices() is None:
            return super().to_peft()
        A, B = self.lora_factors()
        return {**super().to_peft(), "lora_A": A, "lora_B": B}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        slices = self._slices()
        return {**tensors, "lora_B": unblock_rows(tensors["lora_B"], slices)} if slices else {**tensors}


class _Linear(Projection):
    """`h = x W0^T + b + s (x A^T) B^T`. A subclass's forward still runs.

    With DoRA, `h = f (x W0^T + s (x A^T) B^T) + b` with the factors f of `dora.py`. Dropout applies to the adapter's
    input only; with DoRA, PEFT also drops from the part of W0 x that f changes.
    """

    has_lora_bias = True
    has_inits = True

    @classmethod
    def layout(cls, module: Any, settings: LayerSettings) -> Layout:
        out_features, in_features = cls._shape(module)
        rows = settings.slices.taken_rows if settings.slices else [out_features]
        return Layout((len(rows) * settings.r, in_features), (sum(rows), settings.r), min(in_features, *rows))

    @classmethod
    def _shape(cls, module: Any) -> tuple[int, int]:
        """(out, in), also where the weight is packed."""
        return module.out_features, module.in_features

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out). The input is the first argument, positional or by name."""
        if not self.lora_enabled:
            base: Tensor = super().forward(*args, **kwargs)
            return base
        x = args[0] if args else next(iter(kwargs.values()))
        if not self._fuses(x):
            return self.lora_finish(super().forward(*args, **kwargs) + self.lora_update(x))
        p = self.lora_dropout.p if self.lora_dropout is not None and self.lora_dropout.training else 0.0
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        bias: Tensor | None = self.bias  # type: ignore[assignment]  # the trained copy where there is one
        W0, scale = weight.t() if self.weight_is_transposed else weight, self.lora_settings.scale
        return self.lora_finish(fused_linear(x, W0, bias, *self.lora_factors(), scale, dropout=p))

    def _fuses(self, x: Any) -> bool:
        """Whether the fused form is used: the base layer's product must be torch's, with a frozen W0."""
        parameters: dict[str, Any] = self._parameters
        return (
            # Some wrappers, such as DataParallel, put plain tensors in the place of parameters.
            (weight := parameters.get("weight")) is not None
            and parameters.keys() >= {"bias", "lora_A", "lora_B"}
            and not weight.requires_grad
            and can_fuse(x, weight, *parameters.values(), *self._buffers.values())
            and _has_torchs_forward(type(self))  # type: ignore[arg-type]  # mypy takes no metaclass for hashable
            and drops_by_bytes(self.lora_settings.dropout)
        )

    def lora_update(self, x: Tensor) -> Tensor:
        """`s (B A - B0 A0) x`, (..., out)."""
        return lora_update(self.lora_input(x), *self.lora_factors(), self.lora_settings.scale)


class LoRALinear(_Linear, nn.Linear):  # type: ignore[misc]  # a wider forward
    """`nn.Linear` and its subclasses, quantized ones among them: W0 is (out, in)."""

    kind = "Linear"
    dora_dim = part_dim = 0

    @classmethod
    def refusal(cls, module: Any, settings: LayerSettings) -> str | None:
        if not is_plain_linear(module):
            return (
                f"{type(module).__name__} has a forward of its own that is not x W^T + b, so that no merge could equal"
                f" the adapted layer: exclude it, or name its weight in target_parameters"
            )
        return super().refusal(module, settings)


class LoRAConv1D(_Linear):
    """transformers' `Conv1D` (GPT-2): W0 is (in, out). A and B lie as for `nn.Linear`."""

    kind = "Conv1D"
    dora_dim = part_dim = 1
    weight_is_transposed = True

    @classmethod
    def _shape(cls, module: Any) -> tuple[int, int]:
        in_features, out_features = module.get_parameter("weight").shape
        return out_features, in_features
