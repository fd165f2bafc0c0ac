"""Strategies and callbacks of Lightning with which LoRA is not trained here, with what to take in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, strategies
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)

from lora_lightning.lora.errors import LoRAError, did_you_mean

TAKE = "take --trainer.strategy fsdp2 (or ddp, where W0 fits on one device)"
INSTEAD: dict[type[Strategy], str] = {
    FSDPStrategy: f"it gathers all of W0 into its checkpoints, and torch no longer develops FSDP1: {TAKE}",
    DeepSpeedStrategy: f"it steps on means of micro-batch means, and saves past our checkpoints: {TAKE}",
    ModelParallelStrategy: f"it leaves the sharding to us, and without it adds up no gradients: {TAKE}",
}
"""Lightning's own strategies that are refused, and why."""
FORMER = dict.fromkeys(("fsdp1", "zero2", "zero3"), f"it is gone: {TAKE}")
"""Names that this package gave to strategies of its own."""

COPY = "it keeps another copy of all of W0 and writes it into the checkpoints: leave it out"
CALLBACKS: dict[type[Callback], str] = {
    StochasticWeightAveraging: COPY,
    WeightAveraging: COPY,
    ModelPruning: "it writes zeros into W0, which LoRA leaves as it is: prune the model before, or leave it out",
}


def refuse_unsupported_callbacks(callbacks: Iterable[Callback]) -> None:
    """Before anything is loaded.

    Raises:
        LoRAError: one of these is among them.
    """
    for callback in callbacks:
        for kind, why in CALLBACKS.items():
            if isinstance(callback, kind):
                raise LoRAError(f"callback {type(callback).__name__}: {why}")


def refuse_unsupported(strategy: Strategy) -> None:
    """Before anything is loaded.

    Raises:
        LoRAError: it is one of these.
    """
    if why := _instead_of(type(strategy)):
        raise LoRAError(f"strategy {type(strategy).__name__}: {why}")


def _instead_of(kind: type) -> str | None:
    """Why a class is refused; a subclass from another package, such as our own, is not."""
    ours = not kind.__module__.startswith("lightning.")
    return None if ours else next((why for known, why in INSTEAD.items() if issubclass(kind, known)), None)


def refuse_unsupported_name(strategy: Any) -> None:
    """Before Lightning makes it, which for these asks for a GPU or a package that would not help.

    Args:
        strategy: what a Trainer is given: a name, the path of a class, or anything else, which is let pass.

    Raises:
        LoRAError: it names one of these, or nothing at all.
    """
    if not isinstance(strategy, str) or strategy.lower() == "auto":
        return
    known = StrategyRegistry.available_strategies()
    short = strategy.rpartition(".")[2]
    if "." in strategy or short in strategies.__all__:
        why = _instead_of(getattr(strategies, short, object))
    elif strategy.lower() in FORMER:
        why = FORMER[strategy.lower()]
    elif strategy.lower() in known:
        why = _instead_of(StrategyRegistry[strategy.lower()]["strategy"])
    else:
        names = ["auto", *(name for name in known if _instead_of(StrategyRegistry[name]["strategy"]) is None)]
        usual = [name for name in names if not re.search("find_unused|notebook|xla|tpu", name)]
        raise LoRAError(
            f"no strategy '{strategy}'{did_you_mean(strategy.lower(), names)} (there are {', '.join(usual)}, and the"
            " overlays in configs/strategy/)"
        )
    if why:
        raise LoRAError(f"strategy {strategy}: {why}")
