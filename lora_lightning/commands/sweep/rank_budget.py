"""`--budget`: for each set of matrices the rank whose trainable parameters are nearest to a number.

The paper's Table 5 so compares sets of matrices at an equal number of parameters. The count is that of `inject` on the
model's shapes: A and B, and all else that trains, such as a new head, which every set has.
"""

from __future__ import annotations

import dataclasses
import sys
from bisect import bisect_right

from torch import nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError, TargetError
from lora_lightning.lora.inject import inject, remove

MOST = 2**16
"""The largest rank that is tried: no layer is wider."""


def trainable(backbone: nn.Module, config: LoRAConfig) -> int:
    """Parameters that train with this config. The backbone, which may be on the meta device, does not change.

    Raises:
        TargetError: the config does not fit it.
    """
    try:
        return inject(backbone, config, run_init=False).trainable
    finally:
        remove(backbone)


def rank_for(backbone: nn.Module, config: LoRAConfig, budget: int) -> int:
    """The r with which this config's trainable parameters are nearest to `budget`; of two equal ones the smaller.

    They grow with r, so bisection finds the last r below the budget; it or the next is the nearest.

    Raises:
        LoRAError: r = 1 already has more than twice the budget.
        TargetError: the config does not fit the backbone.
    """
    first = trainable(backbone, dataclasses.replace(config, r=1, alpha=None))
    if first > 2 * budget:
        raise LoRAError(f"a budget of {budget:,} is too small: with r = 1 {first:,} parameters train")

    def count(r: int) -> int:
        """The count; more than any for a rank that is too large for a layer."""
        try:
            return trainable(backbone, dataclasses.replace(config, r=r, alpha=None))
        except TargetError:
            return sys.maxsize

    below = max(1, bisect_right(range(1, MOST), budget, key=count))
    return min(below, below + 1, key=lambda r: abs(count(r) - budget))
