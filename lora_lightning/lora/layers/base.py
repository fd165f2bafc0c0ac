"""The base class of adapted layers: factors A and B, their options, their place in the module and in PEFT's files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LayerSettings
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.quantization import plain_weight, scheme
from lora_lightning.lora.init import from_weight
from lora_lightning.lora.init.random import init_random_
from lora_lightning.lora.layers.class_swap import Grafted, graft
from lora_lightning.lora.layers.dora import channel_norms, dora_factor, dora_update, rescale
from lora_lightning.lora.layers.functional import wide_dtype

WHOLE = slice(None)
BLOCK = 2**20
"""Elements of one part of a weight: 4 MB in float32, of which a few are in memory at a time."""


class Layout(NamedTuple):
    """What a kind of layer makes of one base module."""

    A: tuple[int, ...]
    """The shape of A."""
    B: tuple[int, ...]
    """The shape of B, whose first dimension is the outputs."""
    largest_rank: int
    """The largest rank that W0 can have; a larger r would add nothing."""
    weights: tuple[str, ...] = ("weight",)
    """The parameters of the module that a merge changes."""


class AdaptedLayer(Grafted):
    """Base of the adapted layers: factors A and B beside a frozen weight.

    A kind says its `layout`, its `refusal`, its `lora_update` in a forward that ends in `lora_finish`, and its
    `delta_weight`; all else is here. A and B are float32, or of W0's dtype where that is wider, on W0's device; so a
    bfloat16 base trains float32 adapters. Tensors of options that are off, such as DoRA's magnitude, are None.
    """

    kind: ClassVar[str]
    linear_like: ClassVar[bool] = False
    """Whether `all-linear` takes this kind, and `slices` may choose parts of it."""
    dora_dim: ClassVar[int | None] = None
    """The dimension of the weight whose slices DoRA rescales; None where the kind has no DoRA form."""
    part_dim: ClassVar[int | None] = None
    """The dimension along which the update can be computed in parts; None where it is computed whole."""
    has_lora_bias: ClassVar[bool] = False
    """True where B may have a bias."""
    has_input: ClassVar[bool] = True
    """False where other code reads the adapted weight as `W0 + s B A`, so that dropout has no input to apply to."""
    has_inits: ClassVar[bool] = False
    """True where A and B are the factors of one matrix in W0's shape, as `init/from_weight.py` needs."""

    lora_settings: LayerSettings
    lora_dropout: nn.Dropout | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_B_bias: nn.Parameter | None
    """B's bias, with `lora_bias`: s times it is added to the output."""
    lora_magnitude_vector: nn.Parameter | None
    """DoRA's magnitudes m."""
    lora_A0: Tensor | None
    """A at the start, for the inits other than B = 0: `h = W0 x + s (B A - B0 A0) x`. Never trained."""
    lora_B0: Tensor | None

    @classmethod
    def layout(cls, module: Any, settings: LayerSettings) -> Layout:
        """The shapes of A and B for this base module."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, module: Any, settings: LayerSettings) -> str | None:
        """Why this module cannot be adapted with these settings, and what to do; None where it can."""
        if settings.dropout and not cls.has_input:
            return (
                "others read its weight and its input is not known, so LoRA's dropout cannot be honoured: set dropout"
                " to 0, or for it alone by dropout_pattern"
            )
        return None

    # Make and start.

    @classmethod
    def attach(cls, module: nn.Module, settings: LayerSettings) -> AdaptedLayer:
        """Adapt `module` in place; returns the adapted layer, which for most kinds is the module itself.

        A and B have no values until `reset_lora_parameters`.
        """
        graft(module, cls, () if cls.has_input else cls.layout(module, settings).weights)
        assert isinstance(module, AdaptedLayer)
        module.add_factors(settings)
        return module

    def add_factors(self, settings: LayerSettings) -> None:
        """Allocate A, B and the tensors of the options."""
        layout = self.layout(self.lora_owner, settings)
        frozen: Tensor = self.lora_owner._parameters[layout.weights[0]]  # type: ignore[assignment]
        is_subtracted = from_weight.is_subtracted(settings.init)

        def empty(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, dtype=wide_dtype(frozen), device=frozen.device)

        # Directly into nn.Module's dictionaries: over hundreds of layers its attribute checks take most of the time.
        self._parameters.update(
            lora_A=nn.Parameter(empty(layout.A)),
            lora_B=nn.Parameter(empty(layout.B)),
            lora_B_bias=nn.Parameter(empty(layout.B[:1])) if settings.lora_bias else None,
            lora_magnitude_vector=nn.Parameter(empty(layout.B[:1])) if settings.use_dora else None,
        )
        self._buffers.update(
            lora_A0=empty(layout.A) if is_subtracted else None, lora_B0=empty(layout.B) if is_subtracted else None
        )
        self.__dict__["lora_settings"] = settings
        # A module, so that the adapter's mode can differ from the base's.
        if settings.dropout:
            self._modules["lora_dropout"] = nn.Dropout(settings.dropout).train(self.training)
        else:
            self.__dict__["lora_dropout"] = None

    @torch.no_grad()
    def reset_lora_parameters(self, *, from_w0: bool = True) -> None:
        """Initialize A, B and the rest, also of a model that was filled from the meta device.

        For an init that needs data, A is random and B zero until `set_init` is called; likewise for an init from W0
        where `from_w0` is False, since an adapter will be loaded.
        """
        s = self.lora_settings
        if from_w0 and from_weight.is_from_weight(s.init) and not self.lora_A.is_meta:
            self.set_init(*from_weight.factors_from_weight(s.init, self.base_matrix(), s.r, s.scale))
        else:
            self.draw_factors()
            self.set_init(self.lora_A, self.lora_B)
        super().reset_lora_parameters()

    def draw_factors(self) -> None:
        """Draw A and set B to zero."""
        for A, B in self.factor_pairs():
            init_random_(A, B, self.lora_settings.init)

    @torch.no_grad()
    def set_init(self, A: Tensor, B: Tensor) -> None:
        """Start at these factors, and keep them as A0 and B0 where the init subtracts them."""
        for tensor, value in ((self.lora_A, A), (self.lora_B, B), (self.lora_A0, A), (self.lora_B0, B)):
            if tensor is not None:
                tensor.copy_(value)
        if self.lora_B_bias is not None:
            self.lora_B_bias.zero_()
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self.updated_norms())

    def rescale_update(self, strength: float, done: set[int]) -> None:
        """Multiply the layer's alpha and scale s by `strength`.

        With DoRA's factor f = m / ||W0 + s B A||, `W0 + c (W' - W0)` is `(1 + c (f - 1)) W0 + c f s B A`: DoRA again,
        with c s for s, `f / (1 + c (f - 1))` times each row of B, and the m that makes its factor `1 + c (f - 1)`.

        Raises:
            LoRAError: a DoRA channel would have no share of W0 left, which no magnitude can express.
        """
        s, magnitude = self.lora_settings, self.lora_magnitude_vector
        factor = None if magnitude is None else self.dora_factor()
        alpha = strength * s.alpha
        # By the formula: a product may round differently, and a file would then be read as rslora's.
        scale = alpha / s.r if s.scale == s.alpha / s.r else alpha / math.sqrt(s.r)
        self.__dict__["lora_settings"] = replace(s, alpha=alpha, scale=scale)
        if factor is not None and magnitude is not None:
            base_factor = 1 + strength * (factor - 1)
            if not bool(base_factor.all()):
                raise LoRAError(f"a DoRA layer has a channel without W0 at a strength of {strength:g}: take another")
            for B in (self.lora_B, self.lora_B0):
                if B is not None:
                    B.mul_((factor / base_factor).to(B.dtype).view(-1, *[1] * (B.dim() - 1)))
            magnitude.copy_(base_factor * self.updated_norms())
        super().rescale_update(strength, done)

    # Its place in the model.

    def lora_name(self, path: str) -> str:
        """The name in the backbone of what the layer at `path` adapts."""
        return path

    @property
    def lora_owner(self) -> nn.Module:
        """The module whose weight is adapted."""
        return self

    def adapted_parameters(self) -> dict[str, nn.Parameter]:
        """The parts of W0 that a merge changes, by their names in `lora_owner`."""
        owner = self.lora_owner
        return {name: owner._parameters[name] for name in self.layout(owner, self.lora_settings).weights}  # type: ignore[misc]

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each A with the B that multiplies it, as matrices that are views: one pair, or one for each part."""
        return [(self.lora_A, self.lora_B)]

    # Forward: `h = lora_finish(W0 x + b + lora_update(x))`, or a read of the weight.

    def lora_input(self, x: Tensor) -> Tensor:
        """The input of A: x, with LoRA's dropout in training."""
        return x if self.lora_dropout is None else self.lora_dropout(x)

    def lora_finish(self, out: Tensor) -> Tensor:
        """The layer's output from the base's output plus the update: B's bias is added, or DoRA rescales the sum."""
        if self.lora_B_bias is not None:
            out = out + self._along_output(self.lora_B_bias * self.lora_settings.scale).to(out.dtype)
        if self.lora_magnitude_vector is None:
            return out
        bias: Tensor | None = getattr(self, "bias", None)  # the trained copy where there is one
        return rescale(out, self._along_output(self.dora_factor()), None if bias is None else self._along_output(bias))

    def _along_output(self, channels: Tensor) -> Tensor:
        """A number per channel, in a shape that broadcasts against the output: B's trailing ones are the positions."""
        return channels.view(-1, *[1] * (self.lora_B.dim() - 2))

    def dora_factor(self) -> Tensor:
        """DoRA's factor for each channel, 1 at the start."""
        assert self.lora_magnitude_vector is not None
        with _no_autocast(self.lora_A):
            return dora_factor(self.lora_magnitude_vector, self.updated_norms())

    @torch.no_grad()
    def updated_norms(self) -> Tensor:
        """`||W0 + s B A||` per channel of `dora_dim`, without a gradient."""
        assert self.dora_dim is not None
        # Autocast's half precision would round the factor of a fresh adapter to other than 1.
        with _no_autocast(self.lora_A):
            sums = (W0 + delta for _, _, W0, delta in self.updates(with_dora=False))
            return channel_norms(sums, self.dora_dim, self.part_dim)

    def lora_read(self, name: str) -> Tensor:
        weight: Tensor = self.lora_owner._parameters[name]  # type: ignore[assignment]
        is_adapted = self.lora_enabled and "lora_settings" in self.__dict__
        return self.updated_weights()[name].to(weight.dtype) if is_adapted else weight

    # Merge.

    def base_weight(self) -> Tensor:
        """W0 in its dtype; dequantized where the base is quantized."""
        return plain_weight(self)

    def base_matrix(self) -> Tensor:
        """W0 as (out, in), also where the module holds its transpose."""
        return self.base_weight()

    def delta_weight(self, part: slice = WHOLE, name: str = "weight") -> Tensor:
        """`s B A` (less `s B0 A0`) in W0's shape, in float32 or wider: the whole, or a part along `part_dim`."""
        raise NotImplementedError

    def updates(self, *, with_dora: bool = True) -> Iterator[tuple[str, tuple[slice, ...], Tensor, Tensor]]:
        """What a merge adds, as (a weight's name, the index of a part, W0 there, the update), both in the wide dtype.

        A large weight is yielded in parts, so that one part's update is in memory at a time.
        """
        dim, factor = self.part_dim, None
        if with_dora and self.lora_magnitude_vector is not None:
            factor = self.dora_factor()
        for name, parameter in self.adapted_parameters().items():
            weight = self.base_weight() if name == "weight" and scheme(self.lora_owner) else parameter
            count = 1 if dim is None or weight.numel() <= BLOCK else weight.shape[dim]
            step = max(1, BLOCK * count // max(1, weight.numel()))
            for start in range(0, count, step):
                part = WHOLE if count == 1 else slice(start, min(start + step, count))
                place = () if count == 1 else (*[WHOLE] * (dim or 0), part)
                delta = self.delta_weight(part, name)  # first, while the fewest wide tensors are in memory
                W0 = weight[place].to(delta.dtype)
                if factor is not None and self.dora_dim is not None:
                    delta = dora_update(W0, delta, factor[part] if dim == self.dora_dim else factor, self.dora_dim)
                yield name, place, W0, delta

    def updated_weights(self) -> dict[str, Tensor]:
        """`W0 + s B A` by the weights' names, in float32 or wider."""
        parts: dict[str, list[Tensor]] = {}
        with _no_autocast(self.lora_A):  # which would change the weight's dtype
            for name, _, W0, delta in self.updates():
                parts.setdefault(name, []).append(W0 + delta)
        dim = self.part_dim or 0
        return {name: pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) for name, pieces in parts.items()}

    def _lora_dtype(self) -> torch.dtype:
        """The dtype in which updates are added to W0."""
        return wide_dtype(*self.adapted_parameters().values(), self.lora_A)

    # The layer's keys and tensors in PEFT's layout.

    peft_ends: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_B_bias": "lora_B.bias",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }

    @classmethod
    def peft_keys(cls, name: str) -> dict[str, str]:
        """PEFT's key for each tensor that a layer at the module `name` may have."""
        return {tensor: f"{name}.{end}" for tensor, end in cls.peft_ends.items()}

    def peft_rank(self) -> int:
        """The rank of the adapter as PEFT sees it."""
        return self.lora_settings.r

    def to_peft(self) -> dict[str, Tensor]:
        """Our trained tensors in PEFT's layout, without loss."""
        tensors = self.lora_tensors()
        return {name: tensors[name] for name in self.peft_ends if name in tensors}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_peft`.

        Raises:
            AdapterError: no tensors of this kind of layer give the same update.
        """
        return dict(tensors)

    def extra_repr(self) -> str:
        s = self.lora_settings
        return f"{super().extra_repr()}, r={s.r}, alpha={s.alpha:g}, lora_dropout={s.dropout:g}"


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Out of autocast on the tensor's device; the meta device has none."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)
