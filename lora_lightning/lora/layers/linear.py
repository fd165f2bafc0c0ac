"""`nn.Linear` and its subclasses, quantised ones among them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.dora import sum_of_deltas, updated_row_norms
from lora_lightning.lora.functional import lora_update, wide_dtype
from lora_lightning.lora.layers.base import AdaptedLayer


class LoRALinear(AdaptedLayer):
    """`h = x W0^T + b + s (x A^T) B^T`: A is (r, in), B is (out, r). A subclass's own forward is kept.

    With DoRA, `h = f (x W0^T + s (x A^T) B^T) + b` with the factors f of `dora.py`; dropout is on the adapter's
    input alone there too, where PEFT also drops from the part of W0 x that f changes.
    """

    kind = "Linear"
    dora_dim = 0
    has_lora_bias = True
    has_starts = True

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
        return self.lora_combine(out, self.lora_output(args[0] if args else next(iter(kwargs.values()))))

    def lora_output(self, x: Tensor) -> Tensor:
        """`s (B A - B0 A0) x + s b_B`; the two products are alike, so that they cancel exactly at the start."""
        x = self.lora_input(x)
        scale = self.lora_settings.scale
        update = lora_update(x, self.lora_A, self.lora_B, scale)
        if self.lora_A0 is not None and self.lora_B0 is not None:
            update = update - lora_update(x, self.lora_A0, self.lora_B0, scale)
        if self.lora_B_bias is not None:
            update = update + (self.lora_B_bias * scale).to(update.dtype)
        return update

    def delta_weight(self) -> Tensor:
        return sum_of_deltas(self._factors(), wide_dtype(self.weight, self.lora_A))

    def updated_norms(self) -> Tensor:
        return updated_row_norms(self.base_weight(), self._factors(), wide_dtype(self.weight, self.lora_A))

    def _factors(self) -> list[tuple[Tensor, Tensor, float]]:
        scale = self.lora_settings.scale
        factors: list[tuple[Tensor, Tensor, float]] = [(self.lora_A, self.lora_B, scale)]
        if self.lora_A0 is not None and self.lora_B0 is not None:
            factors.append((self.lora_A0, self.lora_B0, -scale))
        return factors

    def _dora_channels(self) -> int:
        return _shape(self)[0]


def _shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features
