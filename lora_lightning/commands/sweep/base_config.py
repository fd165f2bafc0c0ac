"""The config that a sweep varies, parsed as `fit` does, and its model without weights where it comes from the hub.

So `fit`'s errors are raised before the first trial, and `--budget` counts what trains without a download. The paper's
Table 5 compares sets of matrices at an equal number of parameters: A and B, and all else that trains, such as a new
head, which every set has.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pkgutil
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning.backbones.huggingface import huggingface
from lora_lightning.cli.build import build_run
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError, TargetError
from lora_lightning.lora.inject import inject, remove
from lora_lightning.training.preflight import user_metrics_class, why_unlogged

SET_BY_SWEEP = ("config", "name", "runs_dir", "ckpt_path")
"""Parts of a fit's config that a sweep sets itself, and that are not compared with an earlier sweep's."""
MOST = 2**16
"""The largest rank that is tried: no layer is wider."""


@functools.wraps(huggingface)
def build_without_weights(*args: Any, **kwargs: Any) -> nn.Module:
    """`huggingface` with no weights: the model's shapes on the meta device."""
    kwargs |= {"random_weights": True, "on_meta": False}
    with torch.device("meta"):
        return huggingface(*args, **kwargs)


def _without_weights(config: Any) -> None:
    """Build `fit`'s module on the meta device where it comes from the hub, with an init that reads no data."""
    model = config.model
    model.lora["init"], model["init_adapter"] = "gaussian", None
    backbone = model.backbone
    if backbone.get("class_path") and pkgutil.resolve_name(backbone.class_path) is huggingface:
        backbone["class_path"] = f"{__name__}.build_without_weights"
    config.trainer["precision"] = None  # it would set how the backbone loads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A config and what it monitors."""

    name: str
    """The run's name in the config."""
    config: dict[str, Any]
    """Resolved, in JSON's types, without anything that differs between processes."""
    backbone: nn.Module
    """Plain, without adapters."""
    metric: str
    goal: str
    """`min` or `max`: what is better."""
    why_unlogged: Callable[[str], str | None]
    """Returns for a metric None, or why no fit of this config logs it."""
    trainer: Trainer | None = None
    """Only if requested."""
    parser: Any
    """The command's parser, which checks further flags of `fit`."""

    def check(self, args: Sequence[str]) -> LoRAConfig:
        """The `model.lora` of `fit ARGS`, all of whose values are checked.

        Raises:
            ConfigError: a field of `model.lora` has an invalid value.
            SystemExit: `fit` refuses a value; its line is on the screen.
        """
        return LoRAConfig(**self.parser.parse_args(["fit", *args]).fit.model.lora.as_dict())


def open_base(args: Sequence[str], *, trainer: bool = False) -> Base:
    """The config and the module of `fit ARGS`; with `trainer`, also the Trainer.

    Raises:
        LoRAError: an object refuses its arguments.
        SystemExit: `fit` refuses them; its line is on the screen.
    """
    built = build_run(["fit", *args], _without_weights, trainer=trainer)
    module, config = built.module, built.config
    callbacks = config.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    metric, goal = module.task.monitor, str(module.task.monitor_mode)
    for callback in reversed(callbacks):  # a checkpoint's in the config counts before the task's, the first of several
        kind, options = pkgutil.resolve_name(callback.class_path), callback.get("init_args") or {}
        is_checkpoint = isinstance(kind, type) and issubclass(kind, ModelCheckpoint)
        if is_checkpoint and options.get("monitor") not in (None, "auto"):
            metric, goal = str(options["monitor"]), str(options.get("mode") or "min")
    ours = all(callback.class_path.startswith(("lora_lightning.", "lightning.pytorch.")) for callback in callbacks)
    all_known = ours and not user_metrics_class(module)
    values = {key: value for key, value in config.as_dict().items() if key not in SET_BY_SWEEP}
    text = json.dumps(values, default=lambda thing: re.sub(r" at 0x[0-9a-f]+", "", str(thing)))
    return Base(
        name=str(config.name),
        config=json.loads(text),
        backbone=remove(module.backbone),
        metric=metric,
        goal=goal,
        why_unlogged=lambda metric: why_unlogged(metric, module) if all_known else None,
        trainer=built.trainer,
        parser=built.parser,
    )


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
        try:
            return trainable(backbone, dataclasses.replace(config, r=r, alpha=None))
        except TargetError:  # too large for a layer
            return sys.maxsize

    below = max(1, bisect_right(range(1, MOST), budget, key=count))
    return min(below, below + 1, key=lambda r: abs(count(r) - budget))
