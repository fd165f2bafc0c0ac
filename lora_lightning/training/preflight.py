"""Strategies and callbacks of Lightning with which LoRA is not trained here, with what to take in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy, StrategyRegistry

from lora_lightning.lora.errors import LoRAError, did_you_mean

INSTEAD: dict[type[Strategy], str] = {
    FSDPStrategy: "Lightning's FSDP1 gathers all of W0 into its checkpoints: configs/strategy/fsdp2.yaml, or fsdp1.yaml"
    " beside it, shards W0 likewise and writes the adapter alone",
    DeepSpeedStrategy: "Lightning's way with DeepSpeed steps and saves past our guards and our checkpoints:"
    " configs/strategy/deepspeed-zero2.yaml and deepspeed-zero3.yaml have ours; without DeepSpeed,"
    " configs/strategy/ddp.yaml does what ZeRO-2 does and configs/strategy/fsdp2.yaml what ZeRO-3 does",
}

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
    for kind, why in INSTEAD.items():
        if isinstance(strategy, kind):
            raise LoRAError(f"strategy {type(strategy).__name__}: {why}")


def refuse_unsupported_name(strategy: Any) -> None:
    """Before Lightning makes it, which for these asks for a GPU or a package that would not help.

    Raises:
        LoRAError: it is the name of one of these, or of none at all.
    """
    if not isinstance(strategy, str) or strategy.lower() == "auto":
        return
    known = StrategyRegistry.available_strategies()
    if strategy.lower() not in known:
        names = ["auto", *(name for name in known if not issubclass(_class_of(name), tuple(INSTEAD)))]
        usual = [name for name in names if not re.search("find_unused|notebook|xla|tpu", name)]
        raise LoRAError(
            f"no strategy '{strategy}'{did_you_mean(strategy.lower(), names)} (there are {', '.join(usual)}, and the"
            " overlays in configs/strategy/)"
        )
    for kind, why in INSTEAD.items():
        if issubclass(_class_of(strategy.lower()), kind):
            raise LoRAError(f"strategy {strategy}: {why}")


def _class_of(name: str) -> type:
    """What a name in Lightning's registry stands for."""
    found: type = StrategyRegistry[name]["strategy"]
    return found
