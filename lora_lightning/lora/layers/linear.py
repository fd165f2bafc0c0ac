"""`nn.Linear` and its subclasses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.functional import lora_delta, lora_update, wide_dtype
from lora_lightning.lora.layers.base import AdaptedLayer


class LoRALinear(AdaptedLayer):
    """`h = x W0^T + b + s (x A^T) B^T`: A is (r, in), B is (out, r). A subclass's own forward is kept."""

    kind = "Linear"

    @staticmethod
    def factor_shapes(module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, in_features = _shape(module)
        return (r, in_features), (out_features, r)

    @staticmethod
    def largest_rank(module: nn.Module) -> int:
        return min(_shape(module))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out). The input comes first, or by whatever name the base layer gives it."""
        out: Tensor = super().forward(*args, **kwargs)
        if not self.lora_enabled:
            return out
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        return out + lora_update(self.lora_input(x), self.lora_A, self.lora_B, self.lora_settings.scale)

    def delta_weight(self) -> Tensor:
        dtype = wide_dtype(self.weight, self.lora_A)
        return lora_delta(self.lora_A, self.lora_B, self.lora_settings.scale, dtype)


def _shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features
