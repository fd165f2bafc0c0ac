"""`--budget`: for each set of matrices the rank whose trainable parameters are nearest to a number.

The paper's Table 5 so compares sets of matrices at an equal number of parameters. The count is that of `inject` on the
model's shapes: A and B, and all else that trains, such as a new head, which every set has.
"""

from __future__ import annotations

import dataclasses

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

    They grow with r, so halving the interval finds the last r below the budget; it or the next is the nearest.

    Raises:
        LoRAError: r = 1 already has more than twice the budget.
        TargetError: the config does not fit the backbone.
    """

    def count(r: int) -> int | None:
        """The count; None for a rank that is too large for a layer."""
        try:
            return trainable(backbone, dataclasses.replace(config, r=r, alpha=None))
        except TargetError:
            return None

    first = trainable(backbone, dataclasses.replace(config, r=1, alpha=None))
    if first > 2 * budget:
        raise LoRAError(f"a budget of {budget:,} is too small: with r = 1 {first:,} parameters train")
    below, above = 1, MOST
    while above - below > 1:
        middle = (below + above) // 2
        parameters = count(middle)
        if parameters is not None and parameters <= budget:
            below = middle
        else:
            above = middle
    near = {r: parameters for r in (below, above) if (parameters := count(r)) is not None}
    return min(near, key=lambda r: (abs(near[r] - budget), r))
