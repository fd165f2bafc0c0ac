"""Layers that may read one tensor: linear layers of equal input width side by side in one module.

Whether they do shows when they are called; which may is settled at injection, so that what is computed together, and
with it every rounding, is the same in each run.
"""

from __future__ import annotations

from typing import Any

from torch import nn

MOST = 4
"""Query, key, value and output; who does not read the same x costs its few rows of a thin product in vain."""
APART = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""What stands in these is called one after the other, or by choice."""


class Siblings:
    """Shared by the layers that it lists."""

    def __init__(self, parent: nn.Module | None = None, layers: tuple[Any, ...] = ()) -> None:
        self.parent, self.layers = parent, layers

    def of(self, layer: Any) -> list[Any]:
        """The others; none for a layer that is no longer one of them."""
        if not any(one is layer for one in self.layers):
            return []
        return [one for one in self.layers if one is not layer]

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings:
        """With a copy of the module around them, and without it none: a layer copied alone brings no others."""
        from copy import deepcopy

        if self.parent is None or id(self.parent) not in memo:
            return Siblings()
        made = memo[id(self)] = Siblings(memo[id(self.parent)])
        made.layers = tuple(deepcopy(layer, memo) for layer in self.layers)
        return made


def introduce(parent: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let the adapted layers of these kinds right under `parent` know those of their own input width."""
    if isinstance(parent, APART):
        return
    by_width: dict[int, list[Any]] = {}
    for child in parent._modules.values():
        if isinstance(child, kinds) and (A := child._parameters["lora_A"]) is not None:
            by_width.setdefault(A.shape[1], []).append(child)
    for layers in by_width.values():
        if len(layers) > 1:
            together = Siblings(parent, tuple(dict.fromkeys(layers[:MOST])))
            for layer in together.layers:
                layer.__dict__["lora_siblings"] = together
