"""`nn.Linear` and its subclasses, and transformers' `Conv1D`, which is a linear layer that holds its transpose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.functional import (
    block_rows,
    lora_delta,
    lora_update,
    sliced_update,
    unblock_rows,
)
from lora_lightning.lora.layers.base import AdaptedLayer, LayerSettings


class _Projection(AdaptedLayer):
    """`h = x W0^T + b + s (x A^T) B^T`: A is (r, in), B is (out, r). A subclass's own forward is kept.

    With chosen parts of a fused weight, A is (parts r, in) and B (the parts' rows, r), see `slices`.
    """

    linear_like = True
    weight_is_transposed = False

    @classmethod
    def _shape(cls, module: nn.Module) -> tuple[int, int]:
        """(out, in), whatever way the weight lies."""
        raise NotImplementedError

    @classmethod
    def output_rows(cls, module: nn.Module) -> int:
        """Outputs of the layer, for the layout of its parts."""
        return cls._shape(module)[0]

    @classmethod
    def factor_shapes(cls, module: nn.Module, settings: LayerSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, in_features = cls._shape(module)
        if settings.slices is None:
            return (settings.r, in_features), (out_features, settings.r)
        rows = settings.slices.taken_rows
        return (len(rows) * settings.r, in_features), (sum(rows), settings.r)

    @classmethod
    def largest_rank(cls, module: nn.Module, settings: LayerSettings) -> int:
        out_features, in_features = cls._shape(module)
        return min(in_features, *(settings.slices.taken_rows if settings.slices else [out_features]))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out)."""
        out: Tensor = super().forward(x, *args, **kwargs)
        if not self.lora_enabled:
            return out
        s, x = self.lora_settings, self.lora_input(x)
        if s.slices is None:
            return out + lora_update(x, self.lora_A, self.lora_B, s.scale)
        return out + sliced_update(x, self.lora_A, self.lora_B, s.scale, s.slices)

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        s = self.lora_settings
        if s.slices is None:
            return super().factor_pairs()
        return list(zip(torch.split(self.lora_A, s.r), torch.split(self.lora_B, s.slices.taken_rows), strict=True))

    def delta_weight(self) -> Tensor:
        """In W0's orientation."""
        delta = lora_delta(self.lora_A, self.to_peft()["lora_B"], self.lora_settings.scale, self._lora_dtype())
        return delta.mT if self.weight_is_transposed else delta

    def peft_rank(self) -> int:
        """PEFT knows no parts: chosen parts are one adapter of the rank of all together."""
        return self.lora_A.shape[0]

    def to_peft(self) -> dict[str, Tensor]:
        slices = self.lora_settings.slices
        return {"lora_A": self.lora_A, "lora_B": block_rows(self.lora_B, slices) if slices else self.lora_B}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        slices = self.lora_settings.slices
        return (
            {"lora_A": tensors["lora_A"], "lora_B": unblock_rows(tensors["lora_B"], slices)} if slices else {**tensors}
        )


class LoRALinear(_Projection, nn.Linear):  # type: ignore[misc]  # a wider forward
    """`nn.Linear`: W0 is (out, in)."""

    kind = "Linear"

    @classmethod
    def _shape(cls, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features


class LoRAConv1D(_Projection):
    """transformers' `Conv1D` (GPT-2): W0 is (in, out). A and B lie as for `nn.Linear`."""

    kind = "Conv1D"
    weight_is_transposed = True

    @classmethod
    def _shape(cls, module: nn.Module) -> tuple[int, int]:
        in_features, out_features = module.get_parameter("weight").shape
        return out_features, in_features
