"""What options add to an adapted layer: DoRA's magnitude, a bias of B, and starts that are subtracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.lora.frozen.quantization import plain_weight
from lora_lightning.lora.init import from_weight as starts
from lora_lightning.lora.layers.class_swap import Grafted
from lora_lightning.lora.layers.dora import channel_norms, dora_factor, dora_update, rescale
from lora_lightning.lora.layers.fused_linear import can_go_quick
from lora_lightning.lora.norms import thin_row_norms
from lora_lightning.lora.rescale import rescale_
from lora_lightning.lora.targets.fused_projections import Slices


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """One layer's share of the config, resolved."""

    r: int
    alpha: float
    scale: float
    """s in `h = W0 x + s B A x`."""
    dropout: float
    init: str
    use_dora: bool = False
    lora_bias: bool = False
    slices: Slices | None = None
    """The parts of a fused weight that are adapted, each with its own A and B; None adapts it as one."""
    parameter: str = ""
    """The parameter that is adapted, where it is no module's `weight`."""


class WithOptions(Grafted):
    """The optional parts of an adapted layer; a part that is not asked for is None."""

    kind: ClassVar[str]
    dora_dim: ClassVar[int | None] = None
    """The dimension of the weight whose slices DoRA rescales; None where the kind has no DoRA form."""
    dora_output_dim: ClassVar[int] = -1
    """The dimension of the output that belongs to `dora_dim`, counted from the end."""
    has_lora_bias: ClassVar[bool] = False
    """True where B may have a bias."""
    has_starts: ClassVar[bool] = False
    """True where A and B are the factors of one matrix in W0's shape, as the starts of `starts.py` need."""

    lora_names: ClassVar[tuple[str, ...]] = ("lora_B_bias", "lora_magnitude_vector", "lora_A0", "lora_B0")
    lora_settings: LayerSettings
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_B_bias: nn.Parameter | None
    """B's bias, with `lora_bias`: s times it is added to the output."""
    lora_magnitude_vector: nn.Parameter | None
    """DoRA's magnitudes m."""
    lora_A0: Tensor | None
    """Where A started, for the starts other than B = 0: `h = W0 x + s (B A - B0 A0) x`. Never trained."""
    lora_B0: Tensor | None

    def _add_options(self, settings: LayerSettings) -> None:
        """Allocate what the options need; a name that is not needed holds None."""
        bias = magnitude = start_a = start_b = None
        if settings.lora_bias:
            bias = nn.Parameter(self.lora_A.new_empty(self.lora_B.shape[0]))
        if settings.use_dora:
            magnitude = nn.Parameter(self.lora_A.new_empty(self._dora_channels()))
        if starts.is_subtracted(settings.init):
            start_a, start_b = torch.zeros_like(self.lora_A.data), torch.zeros_like(self.lora_B.data)
        self._parameters.update(lora_B_bias=bias, lora_magnitude_vector=magnitude)
        self._buffers.update(lora_A0=start_a, lora_B0=start_b)

    def reset_lora_parameters(self) -> None:
        """Start A, B and the rest anew: also what a model filled from the meta device needs.

        A start that needs data is the plain one here; `set_start` puts it in.
        """
        settings = self.lora_settings
        if starts.from_weight(settings.init) and self.lora_A.device.type != "meta":
            self.set_start(*starts.start_from_weight(settings.init, self.base_matrix(), settings.r, settings.scale))
        else:
            self._start_plainly()

    def _start_plainly(self) -> None:
        with torch.no_grad():
            self.draw_factors()
            self._reset_options()

    def draw_factors(self) -> None:
        """Start with a drawn A and a B of zero."""
        raise NotImplementedError

    @torch.no_grad()
    def set_start(self, A: Tensor, B: Tensor) -> None:
        """Start at these factors, and keep them to subtract where that is the start's way."""
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self._reset_options()

    def _reset_options(self) -> None:
        if self.lora_A0 is not None and self.lora_B0 is not None:
            self.lora_A0.copy_(self.lora_A)
            self.lora_B0.copy_(self.lora_B)
        if self.lora_B_bias is not None:
            self.lora_B_bias.zero_()
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self.updated_norms())

    def lora_combine(self, out: Tensor, update: Tensor) -> Tensor:
        """The layer's output from the base's `out` and the adapter's `update`, both before any factor of DoRA."""
        if self.lora_magnitude_vector is None:
            return out + update
        bias = self._parameters.get("bias")
        if bias is not None:
            bias = self._along_output(self.bias)  # type: ignore[assignment,arg-type]  # the trained one where there is one
        return rescale(out, update, self._along_output(self.dora_factor()), bias)

    def lora_rescale_(self, out: Tensor, bias: Tensor | None) -> Tensor:
        """The same from the sum of both, into which `bias` (out,) has gone: the quick form, which may write into it."""
        if self.lora_magnitude_vector is None:
            return out
        bias = None if bias is None else self._along_output(bias)
        return rescale_(out, self._along_output(self.dora_factor()), bias)

    def _along_output(self, channels: Tensor) -> Tensor:
        """Numbers of the channels, in a shape that broadcasts against the output."""
        return channels.view(-1, *[1] * (-1 - self.dora_output_dim))

    def base_weight(self) -> Tensor:
        """W0 as numbers, in its own dtype; dequantised where the base is quantised."""
        return plain_weight(self)

    def base_matrix(self) -> Tensor:
        """W0 as (out, in), whatever way it lies in the module."""
        return self.base_weight()

    def delta_weight(self) -> Tensor:
        """`s B A` (less `s B0 A0`) in W0's shape, in float32 or wider."""
        raise NotImplementedError

    def update_weight(self) -> Tensor:
        """What a merge adds to W0, in float32 or wider: `s B A`, and DoRA's rescaling where it is on."""
        delta = self.delta_weight()
        if self.lora_magnitude_vector is None or self.dora_dim is None:
            return delta
        return dora_update(self.base_weight(), delta, self.dora_factor(), self.dora_dim)

    def update_bias(self) -> Tensor | None:
        """What a merge adds to the bias, in float32 or wider; None without `lora_bias`."""
        return None if self.lora_B_bias is None else self.lora_B_bias * self.lora_settings.scale

    def updated_norms(self) -> Tensor:
        """`||W0 + s B A||` per channel of `dora_dim`, without a gradient."""
        # Not in autocast's half precision, whose rounding would make the factor of a fresh adapter other than 1.
        with torch.no_grad(), _no_autocast(self.lora_A):
            thin = self._thin_norms()
            return self._dense_norms() if thin is None else thin

    def _dense_norms(self) -> Tensor:
        """From the whole of `W0 + s B A`."""
        assert self.dora_dim is not None
        delta = self.delta_weight()
        return channel_norms(self.base_weight().to(delta.dtype) + delta, self.dora_dim)

    def _base_norms(self) -> Tensor:
        """`||W0||` as `_dense_norms` computes it where the update is zero."""
        assert self.dora_dim is not None
        return channel_norms(self.base_weight().to(self._lora_dtype()), self.dora_dim)

    def _thin_norms(self) -> Tensor | None:
        """By `thin_row_norms`, where that applies: not on a GPU, which would have to wait for a question it asks."""
        if torch.compiler.is_compiling():
            return None
        weight, factors = self._parameters.get("weight"), self._row_factors()
        if weight is None or factors is None or weight.device.type != "cpu" or weight.is_inference():
            return None
        if not (weight.is_floating_point() and can_go_quick(self.lora_A, weight, self.lora_B)):
            return None
        return thin_row_norms(self._base_norms(), *factors, self.lora_settings.scale)

    def _row_factors(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """W0 (m, k) with DoRA's channels as its rows, and A (r, k), B (m, r); None where the kind has no such form."""
        return None

    def _lora_dtype(self) -> torch.dtype:
        """The dtype in which updates are added to W0."""
        raise NotImplementedError

    def arithmetic(self) -> str:
        """By which arithmetic the layer computes an ordinary call: `quick`, or `plain: ` and why."""
        why = self.why_plain()
        return "quick" if why is None else f"plain: {why}"

    def why_plain(self) -> str | None:
        """What keeps the layer from the quick arithmetic; None where it takes it."""
        return f"no quick form of {self.kind}"

    def dora_factor(self) -> Tensor:
        """DoRA's factor for each channel, 1 at the start."""
        assert self.lora_magnitude_vector is not None
        with _no_autocast(self.lora_A):
            return dora_factor(self.lora_magnitude_vector, self.updated_norms())

    def _dora_channels(self) -> int:
        assert self.dora_dim is not None
        return int(self.get_parameter("weight").shape[self.dora_dim])


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Out of autocast on the tensor's device; the meta device has none."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)
