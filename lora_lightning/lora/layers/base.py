"""How an adapter gets into a module: the module stays the object that it is and changes its class.

`graft(module, LoRALinear)` gives the module a class derived from `LoRALinear` and from its own class. So
its keys, hooks, mode, ties and every reference to it survive, `isinstance` keeps telling the truth, nothing
is copied, and `ungraft` is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.lora import starts
from lora_lightning.lora.dora import channel_norms, dora_factor, dora_update, rescale
from lora_lightning.lora.functional import wide_dtype
from lora_lightning.lora.init import STARTS, start_
from lora_lightning.lora.quantised import plain_weight


class Grafted(nn.Module):
    """A module whose class was extended in place. Derived classes add parameters and override `forward`."""

    lora_enabled: bool = True
    """False while the adapter is switched off, see `disabled`."""

    grafted_from: ClassVar[tuple[type[Grafted], type[nn.Module]]]
    """The class that was added and the module's own, which may be a grafted one itself."""

    lora_names: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters and buffers that the class may add to the module: the adapter's tensors."""

    def lora_tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors that this module holds, by name, from every class that was grafted onto it."""
        names = [name for cls in type(self).__mro__ if issubclass(cls, Grafted) for name in cls.lora_names]
        own: dict[str, Tensor | None] = {**self._parameters, **self._buffers}
        return {name: tensor for name in dict.fromkeys(names) if (tensor := own.get(name)) is not None}

    def reset_lora_parameters(self) -> None:
        """Start the adapter's tensors anew, from what the module's own tensors are now."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and deepcopy by the classes that the made one stands for: it has no import path itself."""
        return _blank, _chain(type(self)), self.__getstate__()  # type: ignore[no-untyped-call]


def _chain(cls: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """The importable classes of a grafted one: the added ones, outermost first, then the module's own."""
    if "grafted_from" not in vars(cls):
        return (cls,)
    assert issubclass(cls, Grafted)
    added, base = cls.grafted_from
    return (added, *_chain(base))


def _blank(*classes: type[nn.Module]) -> nn.Module:
    *added, cls = classes
    for outer in reversed(added):
        assert issubclass(outer, Grafted)
        cls = _grafted_class(outer, cls)
    module: nn.Module = cls.__new__(cls)
    return module


_MADE: dict[tuple[type[Grafted], type[nn.Module]], type[nn.Module]] = {}


def _grafted_class(added: type[Grafted], base: type[nn.Module]) -> type[nn.Module]:
    """One class per pair, so that equal kinds of layer stay of equal type."""
    if (added, base) in _MADE:
        return _MADE[added, base]
    names = {"__module__": added.__module__, "grafted_from": (added, base)}
    made: type[nn.Module] = type(f"{added.__name__}[{base.__name__}]", (added, base), names)
    _MADE[added, base] = made
    return made


def graft(module: nn.Module, added: type[Grafted]) -> None:
    """Put `added` in front of the module's class, in place."""
    module.__class__ = _grafted_class(added, type(module))


def ungraft(module: Grafted) -> None:
    """Take the class that was put in front last off the module again, in place."""
    module.__class__ = module.grafted_from[1]  # type: ignore[assignment]


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


class AdaptedLayer(Grafted):
    """Base of the adapted layers: factors A and B beside a frozen weight.

    A is drawn in float32, or in W0's dtype where that is wider, on W0's device; so a bfloat16 base trains
    float32 adapters.
    """

    kind: ClassVar[str]
    dora_dim: ClassVar[int | None] = None
    """The dimension of the weight whose slices DoRA rescales; None where the kind has no DoRA form."""
    dora_output_dim: ClassVar[int] = -1
    """The dimension of the output that belongs to `dora_dim`, counted from the end."""
    has_lora_bias: ClassVar[bool] = False
    """True where B may have a bias."""
    has_starts: ClassVar[bool] = False
    """True where A and B are the factors of one matrix in W0's shape, as the starts of `starts.py` need."""

    lora_names = ("lora_A", "lora_B", "lora_B_bias", "lora_magnitude_vector", "lora_A0", "lora_B0")
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
    lora_dropout: nn.Dropout | None
    weight: nn.Parameter

    @staticmethod
    def factor_shapes(module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for this base module."""
        raise NotImplementedError

    @staticmethod
    def largest_rank(module: nn.Module) -> int:
        """The rank of W0 at most; a larger r would be spent on nothing."""
        raise NotImplementedError

    def add_factors(self, settings: LayerSettings, *, start: bool = True) -> None:
        """Allocate A, B and what the settings ask for, and start them; plainly where they will be loaded over."""
        shape_a, shape_b = self.factor_shapes(self, settings.r)
        dtype, device = wide_dtype(self.weight), self.weight.device
        self.lora_settings = settings
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(shape_b, dtype=dtype, device=device))
        # A module of its own, so that the adapter's mode is set apart from the base's.
        self.lora_dropout = nn.Dropout(settings.dropout).train(self.training) if settings.dropout else None
        self._add_options(settings)
        if start:
            self.reset_lora_parameters()
        else:
            self._start_plainly()

    def _add_options(self, settings: LayerSettings) -> None:
        """Allocate what the options need; a name that is not needed holds None."""
        bias = magnitude = start_a = start_b = None
        if settings.lora_bias:
            bias = nn.Parameter(self.lora_A.new_empty(self.lora_B.shape[0]))
        if settings.use_dora:
            magnitude = nn.Parameter(self.lora_A.new_empty(self._dora_channels()))
        if starts.is_subtracted(settings.init):
            start_a, start_b = torch.zeros_like(self.lora_A.data), torch.zeros_like(self.lora_B.data)
        self.register_parameter("lora_B_bias", bias)
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.register_buffer("lora_A0", start_a)
        self.register_buffer("lora_B0", start_b)

    def drop_factors(self) -> None:
        """Remove all that `add_factors` added."""
        for store in (self._parameters, self._buffers, self._modules, self.__dict__):
            for name in ("lora_settings", "lora_dropout", "lora_enabled", *AdaptedLayer.lora_names):
                store.pop(name, None)

    def reset_lora_parameters(self) -> None:
        """Start A, B and the rest anew: also what a model filled from the meta device needs.

        A start that needs data is the plain one here; `set_start` puts it in.
        """
        settings = self.lora_settings
        if starts.from_weight(settings.init) and self.lora_A.device.type != "meta":
            self.set_start(*starts.start_from_weight(settings.init, self.base_weight(), settings.r, settings.scale))
        else:
            self._start_plainly()

    def _start_plainly(self) -> None:
        init = self.lora_settings.init
        start_(self.lora_A, self.lora_B, init if init in STARTS else "gaussian")
        self._reset_options()

    @torch.no_grad()
    def set_start(self, A: Tensor, B: Tensor) -> None:
        """Start at these factors, and keep them to subtract where that is the start's way."""
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self._reset_options()

    @torch.no_grad()
    def _reset_options(self) -> None:
        if self.lora_A0 is not None and self.lora_B0 is not None:
            self.lora_A0.copy_(self.lora_A)
            self.lora_B0.copy_(self.lora_B)
        if self.lora_B_bias is not None:
            self.lora_B_bias.zero_()
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self.updated_norms())

    def reset_parameters(self) -> None:
        """Lightning and torch call this on modules that come from the meta device."""
        super().reset_parameters()  # type: ignore[misc]
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def lora_input(self, x: Tensor) -> Tensor:
        """What A sees: x, with LoRA's own dropout in training."""
        return x if self.lora_dropout is None else self.lora_dropout(x)

    def lora_combine(self, out: Tensor, update: Tensor) -> Tensor:
        """The layer's output from the base's `out` and the adapter's `update`, both before any factor of DoRA."""
        if self.lora_magnitude_vector is None:
            return out + update
        shape = (-1, *[1] * (-1 - self.dora_output_dim))
        bias = self._parameters.get("bias")
        if bias is not None:
            bias = self.bias.view(shape)  # type: ignore[operator,assignment]  # the trained one where there is one
        return rescale(out, update, self.dora_factor().view(shape), bias)

    def base_weight(self) -> Tensor:
        """W0 as numbers, in its own dtype; dequantised where the base is quantised."""
        return plain_weight(self)

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
        assert self.dora_dim is not None
        with torch.no_grad():
            delta = self.delta_weight()
            return channel_norms(self.base_weight().to(delta.dtype) + delta, self.dora_dim)

    def dora_factor(self) -> Tensor:
        """DoRA's factor for each channel, 1 at the start."""
        assert self.lora_magnitude_vector is not None
        return dora_factor(self.lora_magnitude_vector, self.updated_norms())

    def _dora_channels(self) -> int:
        assert self.dora_dim is not None
        return int(self.weight.shape[self.dora_dim])

    def extra_repr(self) -> str:
        s = self.lora_settings
        return f"{super().extra_repr()}, r={s.r}, alpha={s.alpha:g}, lora_dropout={s.dropout:g}"
