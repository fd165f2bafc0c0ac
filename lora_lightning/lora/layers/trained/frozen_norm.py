"""Batch and instance normalisation of a frozen backbone: running statistics are part of W0."""

from __future__ import annotations

from typing import Any

from lora_lightning.lora.layers.class_swap import Grafted


class FrozenStatistics(Grafted):
    """Normalises by the running statistics and leaves them as they are, in train mode too, adapter on or off."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself computes in eval mode."""
        mode, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = mode
