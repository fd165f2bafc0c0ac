"""A bias trained beside the adapters: `bias: all` and `bias: lora_only`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.lora.layers.class_swap import Grafted, graft, interpolate_, is_shard
from lora_lightning.lora.layers.functional import wide_dtype


class TrainedBias(Grafted):
    """Whoever reads `.bias` of this module gets a trained copy; the original keeps its key and never moves.

    So it serves every kind of module with a bias, and those whose parent reads the bias, such as
    `nn.MultiheadAttention.out_proj`.
    """

    lora_names: ClassVar[tuple[str, ...]] = ("lora_trained_bias",)
    lora_trained_bias: nn.Parameter

    @property
    def bias(self) -> Tensor | None:
        """The trained copy in the original's dtype; the original while the adapter is switched off, or as a shard."""
        frozen = self._parameters["bias"]
        assert frozen is not None
        if not self.lora_enabled or is_shard(frozen):
            return frozen
        # A view where no cast makes a tensor of its own: bitsandbytes sets `.data` of what it gets here.
        return self.lora_trained_bias.view_as(self.lora_trained_bias).to(frozen.dtype)

    @classmethod
    def attach(cls, module: nn.Module, copies: dict[int, nn.Parameter]) -> None:
        """Copy the module's bias, in float32 or wider, and train the copy. `copies` by the original's id: ties stay."""
        graft(module, cls)
        frozen = module._parameters["bias"]
        assert frozen is not None
        if id(frozen) not in copies:
            copies[id(frozen)] = nn.Parameter(frozen.detach().clone().to(wide_dtype(frozen)))
        module.lora_trained_bias = copies[id(frozen)]

    @torch.no_grad()
    def fold(self, folded: dict[int, nn.Parameter]) -> None:
        """Make the trained values the module's own, in a new parameter. `folded` by the copy's id: ties stay."""
        frozen = self._parameters["bias"]
        assert frozen is not None
        trained = self.lora_trained_bias
        if id(trained) not in folded:
            value = trained.detach().clone().to(frozen.dtype)
            folded[id(trained)] = nn.Parameter(value, requires_grad=frozen.requires_grad)
        self._parameters["bias"] = folded[id(trained)]

    def rescale_update(self, strength: float, done: set[int]) -> None:
        frozen = self._parameters["bias"]
        assert frozen is not None
        interpolate_(self.lora_trained_bias, frozen, strength, done)
        super().rescale_update(strength, done)

    def reset_lora_parameters(self) -> None:
        """Start the copy anew from the original."""
        frozen = self._parameters["bias"]
        assert frozen is not None
        with torch.no_grad():
            self.lora_trained_bias.copy_(frozen)
        super().reset_lora_parameters()

    def reset_parameters(self) -> None:
        """What resets the module means its own bias, not the copy."""
        with self.lora_disabled():
            super().reset_parameters()  # type: ignore[misc]
        with torch.no_grad():
            self.lora_trained_bias.copy_(self._parameters["bias"])  # type: ignore[arg-type]
