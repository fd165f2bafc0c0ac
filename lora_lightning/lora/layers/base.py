"""What every adapted layer has: factors A and B, their place in the module, and their layout in PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.lora.init.random import STARTS, start_
from lora_lightning.lora.layers.class_swap import graft, ungraft
from lora_lightning.lora.layers.functional import wide_dtype
from lora_lightning.lora.layers.options import LayerSettings, WithOptions

_STATE = (
    "lora_settings",
    "lora_dropout",
    "lora_enabled",
    "lora_siblings",
    "lora_prepare",
    "lora_replays",
)
"""What a layer has besides tensors."""


class AdaptedLayer(WithOptions):
    """Base of the adapted layers: factors A and B beside a frozen weight.

    A is drawn in float32, or in W0's dtype where that is wider, on W0's device; so a bfloat16 base trains
    float32 adapters.
    """

    linear_like: ClassVar[bool] = False
    """Whether `all-linear` takes this kind."""
    lora_names = ("lora_A", "lora_B", *WithOptions.lora_names)
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
        weight = module._parameters["weight"]
        assert weight is not None
        return {"weight": weight}

    @classmethod
    def attach(cls, module: nn.Module, settings: LayerSettings, *, start: bool = True) -> AdaptedLayer:
        """Adapt `module` in place; returns the adapted layer, which for most kinds is the module itself."""
        graft(module, cls)
        assert isinstance(module, AdaptedLayer)
        module.add_factors(settings, start=start)
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

    def add_factors(self, settings: LayerSettings, *, start: bool = True) -> None:
        """Allocate A, B and what the settings ask for, and start them; plainly where they will be loaded over."""
        shape_a, shape_b = self.factor_shapes(self.lora_owner, settings)
        frozen = next(iter(self.adapted_parameters(self.lora_owner, settings).values()))
        dtype, device = wide_dtype(frozen), frozen.device
        # Into the stores that nn.Module keeps: over hundreds of layers its attribute checks are what takes the time.
        self._parameters.update(
            lora_A=nn.Parameter(torch.empty(shape_a, dtype=dtype, device=device)),
            lora_B=nn.Parameter(torch.empty(shape_b, dtype=dtype, device=device)),
        )
        self.__dict__["lora_settings"] = settings
        # A module of its own, so that the adapter's mode is set apart from the base's.
        if settings.dropout:
            self._modules["lora_dropout"] = nn.Dropout(settings.dropout).train(self.training)
        else:
            self.__dict__["lora_dropout"] = None
        self._add_options(settings)
        if start:
            self.reset_lora_parameters()
        else:
            self._start_plainly()

    def drop_factors(self) -> None:
        """Remove all that `add_factors` added, or got to add before it failed."""
        for store in (self._parameters, self._buffers, self._modules, self.__dict__):
            for name in (*_STATE, *AdaptedLayer.lora_names):
                store.pop(name, None)

    def draw_factors(self) -> None:
        """Start with a drawn A and a B of zero; starts of another kind are put in later."""
        init = self.lora_settings.init
        for A, B in self.factor_pairs():
            start_(A, B, init if init in STARTS else "gaussian")

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

    def _dropout_now(self) -> float:
        """The probability with which this call drops."""
        return self.lora_dropout.p if self.lora_dropout is not None and self.lora_dropout.training else 0.0

    def weight_deltas(self) -> dict[str, Tensor]:
        """The updates that a merge adds, by the same names as `adapted_parameters`."""
        (name,) = self.adapted_parameters(self.lora_owner, self.lora_settings)
        return {name: self.update_weight()}

    def _lora_dtype(self) -> torch.dtype:
        """The dtype in which updates are added to W0."""
        return wide_dtype(*self.adapted_parameters(self.lora_owner, self.lora_settings).values(), self.lora_A)

    # PEFT's directories: what a layer is called there, and its tensors in PEFT's layout.

    @staticmethod
    def peft_keys(name: str) -> dict[str, str]:
        """PEFT's key for each tensor that we may have at the module `name`."""
        return {
            "lora_A": f"{name}.lora_A.weight",
            "lora_B": f"{name}.lora_B.weight",
            "lora_B_bias": f"{name}.lora_B.bias",
            "lora_magnitude_vector": f"{name}.lora_magnitude_vector",
        }

    def peft_rank(self) -> int:
        """The rank of the adapter as PEFT sees it."""
        return self.lora_settings.r

    def to_peft(self) -> dict[str, Tensor]:
        """Our trained tensors in PEFT's layout, without loss."""
        own = self.lora_tensors()
        return {name: own[name] for name in AdaptedLayer.peft_keys("") if name in own}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_peft`.

        Raises:
            AdapterError: PEFT's tensors say something that this kind of layer cannot do.
        """
        return dict(tensors)

    def extra_repr(self) -> str:
        s = self.lora_settings
        return f"{super().extra_repr()}, r={s.r}, alpha={s.alpha:g}, lora_dropout={s.dropout:g}"
