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

from lora_lightning.lora.functional import wide_dtype
from lora_lightning.lora.init import start_


class Grafted(nn.Module):
    """A module whose class was extended in place. Derived classes add parameters and override `forward`."""

    lora_enabled: bool = True
    """False while the adapter is switched off, see `disabled`."""

    grafted_from: ClassVar[tuple[type[Grafted], type[nn.Module]]]
    """The class that was added and the module's own."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and deepcopy by the two classes that the made one stands for: it has no import path itself."""
        return _blank, self.grafted_from, self.__getstate__()  # type: ignore[no-untyped-call]


def _blank(added: type[Grafted], base: type[nn.Module]) -> nn.Module:
    cls = _grafted_class(added, base)
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
    """Give the module its original class back, in place."""
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


class AdaptedLayer(Grafted):
    """Base of the adapted layers: factors A and B beside a frozen weight.

    A is drawn in float32, or in W0's dtype where that is wider, on W0's device; so a bfloat16 base trains
    float32 adapters.
    """

    kind: ClassVar[str]
    lora_settings: LayerSettings
    lora_A: nn.Parameter
    lora_B: nn.Parameter
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

    def add_factors(self, settings: LayerSettings) -> None:
        """Allocate A and B and start them. Nothing else is allocated."""
        shape_a, shape_b = self.factor_shapes(self, settings.r)
        dtype, device = wide_dtype(self.weight), self.weight.device
        self.lora_settings = settings
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(shape_b, dtype=dtype, device=device))
        # A module of its own, so that the adapter's mode is set apart from the base's.
        self.lora_dropout = nn.Dropout(settings.dropout).train(self.training) if settings.dropout else None
        self.reset_lora_parameters()

    def drop_factors(self) -> None:
        """Remove all that `add_factors` added."""
        for store in (self._parameters, self._modules, self.__dict__):
            for name in ("lora_settings", "lora_A", "lora_B", "lora_dropout", "lora_enabled"):
                store.pop(name, None)

    def reset_lora_parameters(self) -> None:
        """Start A and B anew: also what a model filled from the meta device needs."""
        start_(self.lora_A, self.lora_B, self.lora_settings.init)

    def reset_parameters(self) -> None:
        """Lightning and torch call this on modules that come from the meta device."""
        super().reset_parameters()  # type: ignore[misc]
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def lora_input(self, x: Tensor) -> Tensor:
        """What A sees: x, with LoRA's own dropout in training."""
        return x if self.lora_dropout is None else self.lora_dropout(x)

    def delta_weight(self) -> Tensor:
        """`s B A` in W0's shape, in float32 or wider."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        s = self.lora_settings
        return f"{super().extra_repr()}, r={s.r}, alpha={s.alpha:g}, lora_dropout={s.dropout:g}"
