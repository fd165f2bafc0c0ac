"""`nn.Linear` and its subclasses, and transformers' `Conv1D`, which is a linear layer that holds its transpose."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.layers.base import AdaptedLayer
from lora_lightning.lora.layers.class_swap import own_class
from lora_lightning.lora.layers.dora import sum_of_deltas, updated_row_norms
from lora_lightning.lora.layers.functional import block_rows, lora_update, moved_factors, sliced_update, unblock_rows
from lora_lightning.lora.layers.fused_linear import Frozen, can_go_quick, has_few_rows, quick_linear
from lora_lightning.lora.layers.options import LayerSettings
from lora_lightning.lora.layers.ordinary import drops_by_bytes, has_weights_of_its_own, of_one_dtype, why_not_ordinary
from lora_lightning.lora.layers.siblings import Siblings
from lora_lightning.lora.products import Prepare
from lora_lightning.lora.quick_bias import with_bias_gradient
from lora_lightning.lora.reading import Down
from lora_lightning.lora.replay import Replays
from lora_lightning.lora.traced import is_ordinary

CONV1D = "transformers.pytorch_utils.Conv1D"
"""By its name: this part of the code does not import transformers."""

_NEEDED = {"bias", "lora_A", "lora_B", "lora_B_bias", "lora_magnitude_vector"}
"""Names under which a layer holds a parameter, or None."""

MOST_IN_PARTS = 16
"""Ranks of all chosen parts together. Above, what the quick form multiplies with zeros costs what it gains."""


@functools.cache
def _computes_plainly(cls: type) -> bool:
    """Whether the base layer's forward is torch's or transformers' own, and reads its weights as they lie there."""
    own = own_class(cls)
    plain = own.forward is nn.Linear.forward or f"{own.__module__}.{own.__qualname__}" == CONV1D
    return plain and has_weights_of_its_own(cls)


class _Projection(AdaptedLayer):
    """`h = x W0^T + b + s (x A^T) B^T`: A is (r, in), B is (out, r). A subclass's own forward is kept.

    With chosen parts of a fused weight, A is (parts r, in) and B (the parts' rows, r), see `slices`. With DoRA,
    `h = f (x W0^T + s (x A^T) B^T) + b` with the factors f of `dora.py`; dropout is on the adapter's input alone there
    too, where PEFT also drops from the part of W0 x that f changes.
    """

    linear_like = True
    weight_is_transposed = False
    has_lora_bias = True
    has_starts = True
    lora_prepare: Prepare = "auto"
    lora_replays: Replays | None = None
    """Both: see `switches.py`."""

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

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out). The input comes first, or by whatever name the base layer gives it."""
        x = args[0] if args else next(iter(kwargs.values()))
        if self.lora_enabled and self._goes_quick(x):
            return self._quick(x)
        out: Tensor = super().forward(*args, **kwargs)
        return self.lora_combine(out, self.lora_output(x)) if self.lora_enabled else out

    def _quick(self, x: Tensor) -> Tensor:
        """`lora_combine(x W0^T + b, lora_output(x))` by `quick_linear`, into which every option of a layer goes."""
        bias, of_b = self._biases()
        constant = None if bias is None else bias.detach()
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        p, base = self._dropout_now(), Frozen(weight, constant, self.weight_is_transposed, self.lora_prepare)
        A, B = self._thin_factors()
        siblings = (lambda: self._ready_siblings(p)) if A is self.lora_A else tuple
        down = Down(id(self), A, self.lora_settings.scale)
        out = quick_linear(x, base, down, B, siblings=siblings, dropout=p, replays=self.lora_replays)
        out = self.lora_rescale_(out, constant)
        if bias is not None and bias.requires_grad:
            out = with_bias_gradient(out, bias)
        return out if of_b is None else out.add_(of_b.to(out.dtype))

    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        """b, the trained one where there is one, with s b_B in it; apart where the base has no bias."""
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        if self.lora_B_bias is None:
            return bias, None
        of_b = self.lora_B_bias * self.lora_settings.scale
        return (None, of_b) if bias is None else (bias + of_b, None)

    def _thin_factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) whose product is the update: A itself but where a start is subtracted."""
        A, B, slices = self.lora_A, self.lora_B, self.lora_settings.slices
        if self.lora_A0 is not None and self.lora_B0 is not None:
            A, B = moved_factors(A, B, self.lora_A0, self.lora_B0)  # type: ignore[assignment]
        return A, B if slices is None else block_rows(B, slices)

    def _goes_quick(self, x: Any) -> bool:
        """Whether `quick_linear` computes this call: torch's own arithmetic in the base, and W0 frozen."""
        cls: Any = type(self)
        if torch.compiler.is_compiling() or not _computes_plainly(cls):
            return False
        own = self._parameters
        weight = own.get("weight")
        if self._has_wide_parts():
            return False
        # Some wrappers, such as FSDP1 and DataParallel, hang plain tensors where the parameters were.
        if weight is None or weight.requires_grad or not own.keys() >= _NEEDED:
            return False
        p = self._dropout_now()
        if not drops_by_bytes(p) or (self._gains_by_rows(p) and has_few_rows(x)):
            return False
        return can_go_quick(x, *own.values(), *self._buffers.values()) and of_one_dtype(x, weight)

    def _gains_by_rows(self, dropout: float) -> bool:
        """Whether the quick form of this layer is only quicker, and does nothing else that the plain one does not."""
        asks = self.lora_replays is not None or self.lora_prepare == "on" or self.lora_settings.use_dora
        return not dropout and not asks

    def why_plain(self) -> str | None:
        cls: Any = type(self)
        why = why_not_ordinary(self, of_its_own=not _computes_plainly(cls))
        return f"slices of rank above {MOST_IN_PARTS} together" if why is None and self._has_wide_parts() else why

    def _has_wide_parts(self) -> bool:
        s = self.lora_settings
        return s.slices is not None and s.r * len(s.slices.taken) > MOST_IN_PARTS

    def _ready_siblings(self, dropout: float) -> list[Down]:
        """Those that would take the same x as this layer does now."""
        found: Siblings | None = self.__dict__.get("lora_siblings")
        others = [] if found is None else found.of(self)
        return [
            Down(id(other), other.lora_A, other.lora_settings.scale)
            for other in others
            if isinstance(other, _Projection)
            and other.lora_enabled
            and isinstance(A := other._parameters.get("lora_A"), nn.Parameter)
            and is_ordinary(A)
            and is_ordinary(A.data)
            and A.device == self.lora_A.device
            and other._buffers.get("lora_A0") is None  # else its way down is not A alone
            and other._dropout_now() == dropout
        ]

    def lora_output(self, x: Tensor) -> Tensor:
        """`s (B A - B0 A0) x + s b_B`; the two products are alike, so that they cancel exactly at the start."""
        x = self.lora_input(x)
        update = self._product(x, self.lora_A, self.lora_B)
        if self.lora_A0 is not None and self.lora_B0 is not None:
            update = update - self._product(x, self.lora_A0, self.lora_B0)
        if self.lora_B_bias is not None:
            update = update + (self.lora_B_bias * self.lora_settings.scale).to(update.dtype)
        return update

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        s = self.lora_settings
        return lora_update(x, A, B, s.scale) if s.slices is None else sliced_update(x, A, B, s.scale, s.slices)

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        s = self.lora_settings
        if s.slices is None:
            return super().factor_pairs()
        return list(zip(torch.split(self.lora_A, s.r), torch.split(self.lora_B, s.slices.taken_rows), strict=True))

    def delta_weight(self) -> Tensor:
        """In W0's orientation."""
        delta = sum_of_deltas(self._factors(), self._lora_dtype())
        return delta.mT if self.weight_is_transposed else delta

    def base_matrix(self) -> Tensor:
        return self.base_weight().mT if self.weight_is_transposed else self.base_weight()

    def _dense_norms(self) -> Tensor:
        return updated_row_norms(self.base_matrix(), self._factors(), self._lora_dtype())

    def _base_norms(self) -> Tensor:
        return updated_row_norms(self.base_matrix(), [], self._lora_dtype())

    def _row_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return (self.base_matrix(), *self._thin_factors())

    def _factors(self) -> list[tuple[Tensor, Tensor, float]]:
        scale = self.lora_settings.scale
        factors: list[tuple[Tensor, Tensor, float]] = [(self.lora_A, self.to_peft()["lora_B"], scale)]
        if self.lora_A0 is not None and self.lora_B0 is not None:
            factors.append((self.lora_A0, self.lora_B0, -scale))
        return factors

    def _dora_channels(self) -> int:
        return self._shape(self)[0]

    def peft_rank(self) -> int:
        """PEFT knows no parts: chosen parts are one adapter of the rank of all together."""
        return self.lora_A.shape[0]

    def to_peft(self) -> dict[str, Tensor]:
        tensors, slices = super().to_peft(), self.lora_settings.slices
        return {**tensors, "lora_B": block_rows(self.lora_B, slices)} if slices else tensors

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        slices = self.lora_settings.slices
        return {**tensors, "lora_B": unblock_rows(tensors["lora_B"], slices)} if slices else {**tensors}


class LoRALinear(_Projection, nn.Linear):  # type: ignore[misc]  # a wider forward
    """`nn.Linear` and its subclasses, quantised ones among them: W0 is (out, in)."""

    kind = "Linear"
    dora_dim = 0

    @classmethod
    def _shape(cls, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features


class LoRAConv1D(_Projection):
    """transformers' `Conv1D` (GPT-2): W0 is (in, out). A and B lie as for `nn.Linear`."""

    kind = "Conv1D"
    dora_dim = 1
    weight_is_transposed = True

    @classmethod
    def _shape(cls, module: nn.Module) -> tuple[int, int]:
        in_features, out_features = module.get_parameter("weight").shape
        return out_features, in_features
