"""How an adapter gets into a module: the module stays the same object and changes its class.

`graft(module, LoRALinear)` gives the module a class derived from `LoRALinear` and from its own class. So its keys,
hooks, mode, ties and every reference to it survive, `isinstance` stays true, nothing is copied, and `ungraft` is exact.

Where a subclass's forward changes the result of `super().forward`, as Gemma's embedding scales it, the adapter goes
below the subclass in the MRO, so that the subclass changes `W0 x + s B A x`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import warn


class Grafted(nn.Module):
    """A module whose class was extended in place. Derived classes add tensors, all named `lora_...`, and a `forward`.

    A derived class holds the whole life of what it adds: `attach` puts it into a module, `lora_tensors` are its
    tensors, `reset_lora_parameters` initializes them, `rescale_update` gives them another strength, `fold` writes what
    trains in full into the module's weights, and `take_out` below removes whatever was added.
    """

    lora_enabled: bool = True
    """False while the adapter is switched off, see `disabled`."""

    grafted_from: ClassVar[tuple[type[nn.Module], tuple[Graft, ...]]]
    """The module's own class, and what was grafted onto it, innermost first."""

    lora_from_w0: ClassVar[tuple[str, ...]] = (
        "lora_copy",
        "lora_trained_bias",
        "lora_tokens",
        "lora_magnitude_vector",
        "lora_B0",
    )
    """The tensors, and the child with tensors, that are computed from W0, so that another W0 makes them wrong."""

    def lora_tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors in this module, by name, from every class that was grafted onto it."""
        named = (self._parameters | self._buffers).items()
        return {name: tensor for name, tensor in named if name.startswith("lora_") and tensor is not None}

    def trained_tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What trains in full: each as (the original's name in this module, the trained values, the original)."""
        yield from ()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialize the adapter's tensors, from the module's present weights where the init needs them."""
        for _, trained, original in self.trained_tensors():
            trained.copy_(original)

    def reset_parameters(self) -> None:
        """Reset W0, and the adapter: Lightning and torch call this on modules that come from the meta device."""
        reset_base = getattr(super(), "reset_parameters", getattr(super(), "_reset_parameters", None))
        if reset_base is not None:  # an attention's has the other name, and not every class has one
            with self.lora_disabled():  # so that what is read, and written into, is W0
                reset_base()
        self.reset_lora_parameters()

    def rescale_update(self, strength: float, done: set[int]) -> None:
        """Make each trained W, in place, `W0 + strength (W - W0)`; `strength.scaled` calls this and undoes it.

        At 0 it equals W0, bit for bit. Whole numbers, such as a norm's count of batches, stay but for that. `done`
        holds the ids of the tensors that are scaled already, since several modules may share one.
        """
        for _, trained, original in self.trained_tensors():
            if id(trained) not in done:
                done.add(id(trained))
                base = original.to(trained.dtype)
                if strength == 0:
                    trained.copy_(base)
                elif trained.is_floating_point():
                    trained.copy_(base + strength * (trained - base))

    @torch.no_grad()
    def fold(self, folded: dict[int, Tensor]) -> None:
        """Replace the originals of `trained_tensors` by the trained values, in new tensors.

        They are not written into: a tensor that is tied to another module does not change there. `folded` holds the new
        ones by the id of the trained tensor, so that tied copies stay tied.
        """
        for path, trained, original in [*self.trained_tensors()]:
            if id(trained) not in folded:
                value = trained.detach().clone().to(original.dtype)
                is_parameter = isinstance(original, nn.Parameter)
                folded[id(trained)] = nn.Parameter(value, original.requires_grad) if is_parameter else value
            owner, _, name = path.rpartition(".")
            setattr(self.get_submodule(owner), name, folded[id(trained)])

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """Within the block this module computes as before the adapter."""
        enabled, self.lora_enabled = self.lora_enabled, False
        try:
            yield
        finally:
            self.lora_enabled = enabled

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and deepcopy by the classes from which `graft` made this one, which has no import path."""
        own, grafts = _origin(type(self))
        return _blank, (own, *grafts), self.__getstate__()  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Warn where another W0 is loaded below tensors that were made from the W0 before, and that stay."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        names = [name for name in (*self.lora_tensors(), *self._modules) if name in self.lora_from_w0]
        stale = [name for name in names if not any(key.startswith(prefix + name) for key in state_dict)]
        if stale and any(key.startswith(prefix) and not key.startswith(f"{prefix}lora_") for key in state_dict):
            warn(
                f"load_state_dict put other weights below an adapter whose {' and '.join(stale)} is made from the"
                " weights before: load a base's weights before inject, or call its layers' reset_lora_parameters()"
            )

    def lora_read(self, name: str) -> Tensor:
        """The value that code reads for a parameter that was named at grafting."""
        raise NotImplementedError


Graft = tuple[type[Grafted], tuple[str, ...]]
"""A class that was added, and the parameters that are then read through `lora_read`."""


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that the module had before anything was grafted onto it."""
    own: type[nn.Module] = _origin(cls)[0]
    return own


def _origin(cls: type) -> tuple[Any, tuple[Graft, ...]]:
    origin: tuple[Any, tuple[Graft, ...]] = vars(cls).get("grafted_from", (cls, ()))
    return origin


def _blank(own: Any, *grafts: Graft) -> nn.Module:
    made = _with_grafts(own, *grafts)
    return made.__new__(made)


@functools.cache
def _with_grafts(own: Any, *grafts: Graft) -> type[nn.Module]:
    """The class with these grafts, made once, so that layers of one kind have one type."""
    base: type[nn.Module] = _with_grafts(own, *grafts[:-1]) if grafts else own
    if not grafts:
        return base
    added, read = grafts[-1]
    names = {"__module__": added.__module__, "grafted_from": (own, grafts), **{name: _reader(name) for name in read}}
    bases = (base, added) if _goes_below(added, base) else (added, base)
    return type(f"{added.__name__}[{base.__name__}]", bases, names)


def is_shard(tensor: Tensor | None) -> bool:
    """Whether FSDP2 has sharded the tensor: it reads shards by name, and would take a computed value for a new W0.

    The class is compared by name, since importing it takes longer than importing this package.
    """
    return type(tensor).__name__ == "DTensor"


def _reader(name: str) -> property:
    def read(module: Any) -> Tensor:
        parameter = module._parameters.get(name)
        value: Tensor = parameter if is_shard(parameter) else module.lora_read(name)
        return value

    return property(read)


def _goes_below(added: type[Grafted], base: type[nn.Module]) -> bool:
    """Whether `base` is a subclass of the torch class that `added` adapts, with a forward that calls `super()`."""
    torch_class: type[nn.Module] = next(
        c for c in added.__mro__ if issubclass(c, nn.Module) and not issubclass(c, Grafted)
    )
    if torch_class is nn.Module or base is torch_class or not issubclass(base, torch_class):
        return False
    return base.forward is not torch_class.forward and own_forward_calls_super(base, torch_class)


def own_forward_calls_super(base: type[nn.Module], torch_class: type[nn.Module]) -> bool:
    """Whether every forward between `base` and `torch_class` uses `super()`, which has `__class__` in its closure."""
    between = base.__mro__[: base.__mro__.index(torch_class)]
    forwards = [vars(cls)["forward"] for cls in between if "forward" in vars(cls)]
    return all("__class__" in getattr(forward, "__code__", _blank.__code__).co_freevars for forward in forwards)


def graft(module: nn.Module, added: type[Grafted], read: tuple[str, ...] = ()) -> None:
    """Put `added` into the module's class, in place; parameters named in `read` are read through `lora_read`."""
    own, grafts = _origin(type(module))
    object.__setattr__(module, "__class__", _with_grafts(own, *grafts, (added, read)))  # past nn.Module's slow checks


def ungraft(module: nn.Module, added: type[Grafted]) -> None:
    """Take the class `added`, the last one grafted of its kind, out of the module's class, in place."""
    own, grafts = _origin(type(module))
    last = max(i for i, (kind, _) in enumerate(grafts) if issubclass(kind, added))
    module.__class__ = _with_grafts(own, *grafts[:last], *grafts[last + 1 :])  # type: ignore[assignment]


def take_out(module: nn.Module) -> None:
    """Restore the module's original class, and delete all that grafting added, whose names begin with `lora_`."""
    for store in (module._parameters, module._buffers, module._modules, module.__dict__):
        for name in [name for name in store if name.startswith("lora_")]:
            del store[name]
    module.__class__ = own_class(type(module))  # type: ignore[assignment]
