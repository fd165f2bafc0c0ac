"""A bias trained beside the adapters: `bias: all` and `bias: lora_only`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lora_lightning.lora.layers.class_swap import Grafted, graft, is_shard
from lora_lightning.lora.layers.functional import wide_dtype


class TrainedBias(Grafted):
    """A module whose `.bias` reads as a trained copy, also where a parent reads it; the original never changes."""

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
        """Train a copy of the module's bias, in float32 or wider; `copies`, by the originals' ids, keep ties."""
        graft(module, cls)
        original = module._parameters["bias"]
        assert original is not None
        if id(original) not in copies:
            copies[id(original)] = nn.Parameter(original.detach().clone().to(wide_dtype(original)))
        module.lora_trained_bias = copies[id(original)]

    def trained_tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        original = self._parameters["bias"]
        assert original is not None
        yield "bias", self.lora_trained_bias, original
        yield from super().trained_tensors()
