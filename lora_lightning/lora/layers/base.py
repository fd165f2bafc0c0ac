"""How an adapter gets into a module: the module stays the object that it is and changes its class.

`graft(module, LoRALinear)` gives the module a class derived from `LoRALinear` and from its own class. So
its keys, hooks, mode, ties and every reference to it survive, `isinstance` keeps telling the truth, nothing
is copied, and `ungraft` is exact.

Where a subclass's forward works on what `super().forward` gives, as Gemma's embedding scales it, the adapter goes
below the subclass: what the subclass does, it does to `W0 x + s B A x`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.lora.functional import wide_dtype
from lora_lightning.lora.init import start_
from lora_lightning.lora.slices import Slices


class Grafted(nn.Module):
    """A module whose class was extended in place. Derived classes add parameters and override `forward`."""

    lora_enabled: bool = True
    """False while the adapter is switched off, see `disabled`."""

    grafted_from: ClassVar[tuple[type[Grafted], type[nn.Module], tuple[str, ...]]]
    """The class that was added, the module's own, and the parameters that are read through `lora_read`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and deepcopy by the classes that the made one stands for: it has no import path itself."""
        return _blank, _chain(type(self)), self.__getstate__()  # type: ignore[no-untyped-call]

    def lora_read(self, name: str) -> Tensor:
        """The value of a parameter that was named at grafting, wherever the module's code reads it."""
        raise NotImplementedError


def _chain(cls: type[nn.Module]) -> tuple[type[nn.Module], list[tuple[type[Grafted], tuple[str, ...]]]]:
    """The module's own class, and what was grafted onto it, innermost first."""
    if "grafted_from" not in vars(cls):
        return cls, []
    assert issubclass(cls, Grafted)
    added, base, read = cls.grafted_from
    own, grafts = _chain(base)
    return own, [*grafts, (added, read)]


def _blank(cls: type[nn.Module], grafts: list[tuple[type[Grafted], tuple[str, ...]]]) -> nn.Module:
    for added, read in grafts:
        cls = _grafted_class(added, cls, read)
    module: nn.Module = cls.__new__(cls)
    return module


_MADE: dict[tuple[type[Grafted], type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _grafted_class(added: type[Grafted], base: type[nn.Module], read: tuple[str, ...]) -> type[nn.Module]:
    """One class for each combination, so that equal kinds of layer stay of equal type."""
    key = (added, base, read)
    if key not in _MADE:
        names: dict[str, Any] = {"__module__": added.__module__, "grafted_from": key}
        names |= {name: _reader(name) for name in read}
        bases = (base, added) if _goes_below(added, base) else (added, base)
        made: type[nn.Module] = type(f"{added.__name__}[{base.__name__}]", bases, names)
        _MADE[key] = made
    return _MADE[key]


def _reader(name: str) -> property:
    return property(lambda module: module.lora_read(name))


def _goes_below(added: type[Grafted], base: type[nn.Module]) -> bool:
    """Whether `base` is a subclass, with a forward of its own, of the torch class that `added` adapts."""
    torch_class: type[nn.Module] = next(
        c for c in added.__mro__ if issubclass(c, nn.Module) and not issubclass(c, Grafted)
    )
    if torch_class is nn.Module or base is torch_class or not issubclass(base, torch_class):
        return False
    return base.forward is not torch_class.forward and own_forward_calls_super(base, torch_class)


def own_forward_calls_super(base: type[nn.Module], torch_class: type[nn.Module]) -> bool:
    """Whether every forward between `base` and `torch_class` uses `super()`, which leaves a trace in its closure."""
    between = base.__mro__[: base.__mro__.index(torch_class)]
    forwards = [vars(cls)["forward"] for cls in between if "forward" in vars(cls)]
    return all("__class__" in getattr(forward, "__code__", _blank.__code__).co_freevars for forward in forwards)


def graft(module: nn.Module, added: type[Grafted], read: tuple[str, ...] = ()) -> None:
    """Put `added` into the module's class, in place."""
    module.__class__ = _grafted_class(added, type(module), read)


def ungraft(module: nn.Module, added: type[Grafted]) -> None:
    """Take the class `added`, the one put in last of its kind, out of the module's class, in place."""
    cls, grafts = _chain(type(module))
    last = max(i for i, (kind, _) in enumerate(grafts) if issubclass(kind, added))
    for kind, read in grafts[:last] + grafts[last + 1 :]:
        cls = _grafted_class(kind, cls, read)
    module.__class__ = cls  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """One layer's share of the config, resolved."""

    r: int
    alpha: float
    scale: float
    """s in `h = W0 x + s B A x`."""
    dropout: float
    init: str
    slices: Slices | None = None
    """The parts of a fused weight that are adapted, each with its own A and B; None adapts it as one."""
    parameter: str = ""
    """The parameter that is adapted, where it is no module's `weight`."""


class AdaptedLayer(Grafted):
    """Base of the adapted layers: factors A and B beside a frozen weight.

    A is drawn in float32, or in W0's dtype where that is wider, on W0's device; so a bfloat16 base trains
    float32 adapters.
    """

    kind: ClassVar[str]
    linear_like: ClassVar[bool] = False
    """Whether `all-linear` takes this kind."""
    lora_settings: LayerSettings
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_dropout: nn.Dropout | None

    @classmethod
    def factor_shapes(cls, module: nn.Module, settings: LayerSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for this base module."""
        raise NotImplementedError

    @classmethod
    def largest_rank(cls, module: nn.Module, settings: LayerSettings) -> int:
        """The rank of W0 at most; a larger r would be spent on nothing."""
        raise NotImplementedError

    @classmethod
    def output_rows(cls, module: nn.Module) -> int | None:
        """Rows of a weight that may hold several projections, for `slices`; None where it cannot."""
        return None

    @classmethod
    def refusal(cls, module: nn.Module, settings: LayerSettings) -> str | None:
        """Why this very module cannot be adapted so, and what to do; None where it can."""
        return None

    @classmethod
    def adapted_parameters(cls, module: nn.Module, settings: LayerSettings) -> dict[str, nn.Parameter]:
        """The parts of W0 that a merge changes, by their names in the module."""
        return {"weight": module.get_parameter("weight")}

    @classmethod
    def attach(cls, module: nn.Module, settings: LayerSettings) -> AdaptedLayer:
        """Adapt `module` in place; returns the adapted layer, which for most kinds is the module itself."""
        graft(module, cls)
        assert isinstance(module, AdaptedLayer)
        module.add_factors(settings)
        return module

    def detach(self) -> None:
        """Undo `attach`."""
        self.drop_factors()
        ungraft(self, AdaptedLayer)

    def lora_name(self, path: str) -> str:
        """What is adapted, by its name in the backbone, for the layer at `path`."""
        return path

    @property
    def lora_owner(self) -> nn.Module:
        """The module that holds the adapted part of W0."""
        return self

    def add_factors(self, settings: LayerSettings) -> None:
        """Allocate A and B and start them. Nothing else is allocated."""
        shape_a, shape_b = self.factor_shapes(self.lora_owner, settings)
        frozen = next(iter(self.adapted_parameters(self.lora_owner, settings).values()))
        dtype, device = wide_dtype(frozen), frozen.device
        self.lora_settings = settings
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(shape_b, dtype=dtype, device=device))
        # A module of its own, so that the adapter's mode is set apart from the base's.
        self.lora_dropout = nn.Dropout(settings.dropout).train(self.training) if settings.dropout else None
        self.reset_lora_parameters()

    def drop_factors(self) -> None:
        """Remove all that `add_factors` added."""
        for name in ("lora_settings", "lora_A", "lora_B", "lora_dropout"):
            delattr(self, name)
        self.__dict__.pop("lora_enabled", None)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Start A and B anew: also what a model filled from the meta device needs."""
        for A, B in self.factor_pairs():
            start_(A, B, self.lora_settings.init)

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each A of rank r with its B, as views: one pair, or one for each adapted part."""
        return [(self.lora_A, self.lora_B)]

    def reset_parameters(self) -> None:
        """Lightning and torch call this on modules that come from the meta device."""
        of_base = getattr(super(), "reset_parameters", None)  # not every kind of base has one
        if of_base is not None:
            of_base()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def lora_input(self, x: Tensor) -> Tensor:
        """What A sees: x, with LoRA's own dropout in training."""
        return x if self.lora_dropout is None else self.lora_dropout(x)

    def delta_weight(self) -> Tensor:
        """`s B A` in W0's shape, in float32 or wider."""
        raise NotImplementedError

    def weight_deltas(self) -> dict[str, Tensor]:
        """The updates that a merge adds, by the same names as `adapted_parameters`."""
        (name,) = self.adapted_parameters(self.lora_owner, self.lora_settings)
        return {name: self.delta_weight()}

    def _lora_dtype(self) -> torch.dtype:
        """The dtype in which updates are added to W0."""
        return wide_dtype(*self.adapted_parameters(self.lora_owner, self.lora_settings).values(), self.lora_A)

    # PEFT's directories: what a layer is called there, and its tensors in PEFT's layout.

    @staticmethod
    def peft_keys(name: str) -> dict[str, str]:
        """PEFT's key for each of our tensors of the module `name`."""
        return {"lora_A": f"{name}.lora_A.weight", "lora_B": f"{name}.lora_B.weight"}

    def peft_rank(self) -> int:
        """The rank of the adapter as PEFT sees it."""
        return self.lora_settings.r

    def to_peft(self) -> dict[str, Tensor]:
        """Our tensors in PEFT's layout, without loss."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_peft`.

        Raises:
            AdapterError: PEFT's tensors say something that this kind of layer cannot do.
        """
        return dict(tensors)

    def extra_repr(self) -> str:
        s = self.lora_settings
        return f"{super().extra_repr()}, r={s.r}, alpha={s.alpha:g}, lora_dropout={s.dropout:g}"
