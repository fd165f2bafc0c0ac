"""Batch and instance normalization in a frozen backbone, whose running statistics are part of W0."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.lora.layers.class_swap import Grafted


class FrozenStatistics(Grafted):
    """A norm that uses its running statistics and never updates them, in train mode too, adapter on or off."""

    @staticmethod
    def is_needed(module: nn.Module) -> bool:
        """Whether this is a norm with running statistics, which train mode would update."""
        return module._buffers.get("running_mean") is not None and hasattr(module, "track_running_stats")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as in eval mode."""
        mode, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = mode
