"""A bias trained beside the adapters: `bias: all` and `bias: lora_only`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.lora.layers.class_swap import Grafted, graft, interpolate_, is_shard
from lora_lightning.lora.layers.functional import wide_dtype


class TrainedBias(Grafted):
    """A module whose `.bias` reads as a trained copy; the original keeps its key and never changes.

    This works for every kind of module with a bias, also where the parent reads it, as `nn.MultiheadAttention` reads
    that of `out_proj`.
    """

    lora_names: ClassVar[tuple[str, ...]] = ("lora_trained_bias",)
    lora_trained_bias: nn.Parameter

    @property
    def bias(self) -> Tensor | None:
        """The trained copy in the original's dtype; the original while the adapter is off or the bias is a shard."""
        original = self._parameters["bias"]
        assert original is not None
        if not self.lora_enabled or is_shard(original):
            return original
        # Never the parameter itself, but a view or a cast: bitsandbytes sets `.data` of what it reads.
        return self.lora_trained_bias.view_as(self.lora_trained_bias).to(original.dtype)

    @classmethod
    def attach(cls, module: nn.Module, copies: dict[int, nn.Parameter]) -> None:
        """Copy the module's bias, in float32 or wider, and train the copy.

        `copies` maps the originals' ids to their copies, so that tied biases have one copy.
        """
        graft(module, cls)
        original = module._parameters["bias"]
        assert original is not None
        if id(original) not in copies:
            copies[id(original)] = nn.Parameter(original.detach().clone().to(wide_dtype(original)))
        module.lora_trained_bias = copies[id(original)]

    @torch.no_grad()
    def fold(self, folded: dict[int, nn.Parameter]) -> None:
        """Replace the original by the trained values, in a new parameter.

        `folded` maps the copies' ids to the new parameters, so that tied biases stay tied.
        """
        original = self._parameters["bias"]
        assert original is not None
        trained = self.lora_trained_bias
        if id(trained) not in folded:
            value = trained.detach().clone().to(original.dtype)
            folded[id(trained)] = nn.Parameter(value, requires_grad=original.requires_grad)
        self._parameters["bias"] = folded[id(trained)]

    def rescale_update(self, strength: float, done: set[int]) -> None:
        original = self._parameters["bias"]
        assert original is not None
        interpolate_(self.lora_trained_bias, original, strength, done)
        super().rescale_update(strength, done)

    def reset_lora_parameters(self) -> None:
        """Start the copy from the original again."""
        original = self._parameters["bias"]
        assert original is not None
        with torch.no_grad():
            self.lora_trained_bias.copy_(original)
        super().reset_lora_parameters()

    def reset_parameters(self) -> None:
        """Reset the original bias, and start the copy from it."""
        with self.lora_disabled():
            super().reset_parameters()  # type: ignore[misc]
        with torch.no_grad():
            self.lora_trained_bias.copy_(self._parameters["bias"])  # type: ignore[arg-type]
