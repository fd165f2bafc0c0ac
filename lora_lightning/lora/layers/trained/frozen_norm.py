"""Batch and instance normalization of a frozen backbone: running statistics are part of W0."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.lora.layers.class_swap import Grafted


class FrozenStatistics(Grafted):
    """Normalizes by the running statistics and leaves them as they are, in train mode too, adapter on or off."""

    @staticmethod
    def is_needed(module: nn.Module) -> bool:
        """Whether this is a norm that would update its statistics, which all of torch's and their subclasses have."""
        return module._buffers.get("running_mean") is not None and hasattr(module, "track_running_stats")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself computes in eval mode."""
        mode, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = mode
