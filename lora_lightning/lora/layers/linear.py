"""`nn.Linear` and its subclasses, and transformers' `Conv1D`, which is a linear layer that holds its transpose."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.dora import sum_of_deltas, updated_row_norms
from lora_lightning.lora.drops import dropped_of_256
from lora_lightning.lora.functional import block_rows, lora_update, sliced_update, unblock_rows
from lora_lightning.lora.layers.base import AdaptedLayer
from lora_lightning.lora.layers.graft import own_class
from lora_lightning.lora.layers.options import LayerSettings
from lora_lightning.lora.layers.siblings import Siblings
from lora_lightning.lora.products import Prepare
from lora_lightning.lora.quick import Frozen, can_go_quick, quick_linear
from lora_lightning.lora.reading import Down
from lora_lightning.lora.replay import Replays

CONV1D = "transformers.pytorch_utils.Conv1D"
"""By its name: this part of the code does not import transformers."""


@functools.cache
def _computes_plainly(cls: type) -> bool:
    """Whether the base layer's forward is torch's or transformers' own, and reads its weights as they lie there."""
    own = own_class(cls)
    plain = own.forward is nn.Linear.forward or f"{own.__module__}.{own.__qualname__}" == CONV1D
    return plain and not any(name in vars(base) for base in cls.__mro__ for name in ("weight", "bias"))


def _of_one_dtype(x: Tensor, weight: Tensor) -> bool:
    """Whether torch would multiply these, alike or made alike by autocast."""
    mixed = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    return x.dtype == weight.dtype or mixed


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
            base = Frozen(
                self._parameters["weight"],  # type: ignore[arg-type]
                self._parameters["bias"],
                self.weight_is_transposed,
                self.lora_prepare,
            )
            p = self._dropout_now()
            siblings = lambda: self._ready_siblings(p)  # noqa: E731
            replays = self.lora_replays
            return quick_linear(x, base, self._down(), self.lora_B, siblings=siblings, dropout=p, replays=replays)
        out: Tensor = super().forward(*args, **kwargs)
        return self.lora_combine(out, self.lora_output(x)) if self.lora_enabled else out

    def _goes_quick(self, x: Any) -> bool:
        """Whether `quick_linear` computes this call: torch's own arithmetic in the base, W0 frozen, no options."""
        cls: Any = type(self)
        if torch.compiler.is_compiling() or not _computes_plainly(cls):
            return False
        own, p = self._parameters, self._dropout_now()
        weight, bias = own.get("weight"), own.get("bias")
        # Some wrappers, such as FSDP1 and DataParallel, hang plain tensors where the parameters were.
        if weight is None or not {"bias", "lora_A", "lora_B"} <= own.keys() or not self.is_plain_product():
            return False
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return False
        if p and not 0 < dropped_of_256(p) < 256:
            return False
        return can_go_quick(x, weight, bias, self.lora_A, self.lora_B) and _of_one_dtype(x, weight)

    def _down(self) -> Down:
        return Down(id(self), self.lora_A, self.lora_settings.scale)

    def _ready_siblings(self, dropout: float) -> list[Down]:
        """Those that would take the same x as this layer does now."""
        found: Siblings | None = self.__dict__.get("lora_siblings")
        others = [] if found is None else found.of(self)
        return [
            other._down()
            for other in others
            if isinstance(other, _Projection)
            and other.lora_enabled
            and type(A := other._parameters.get("lora_A")) is nn.Parameter
            and type(A.data) is Tensor
            and A.device == self.lora_A.device
            and other.is_plain_product()
            and other._dropout_now() == dropout
        ]

    def is_plain_product(self) -> bool:
        """Whether the update is `s B A x` and nothing else."""
        s, own = self.lora_settings, self._parameters
        options = own.get("lora_B_bias"), own.get("lora_magnitude_vector"), self._buffers.get("lora_A0"), s.slices
        return all(option is None for option in options)

    def _dropout_now(self) -> float:
        return self.lora_dropout.p if self.lora_dropout is not None and self.lora_dropout.training else 0.0

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

    def updated_norms(self) -> Tensor:
        return updated_row_norms(self.base_matrix(), self._factors(), self._lora_dtype())

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
