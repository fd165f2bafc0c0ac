"""The config of a sweep, parsed as `fit` does, and built without weights where the model comes from the hub.

So `fit`'s errors are raised before the first trial.
"""

from __future__ import annotations

import functools
import json
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning.backbones.huggingface import huggingface
from lora_lightning.cli.build import build_run
from lora_lightning.lora.inject import remove
from lora_lightning.training.preflight import user_metrics_class, why_unlogged

NOT_COMPARED = ("config", "name", "runs_dir", "ckpt_path")
"""Parts of a fit's config that a sweep sets itself."""


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


@dataclass(frozen=True, kw_only=True)
class Base:
    """A config and what it monitors."""

    name: str
    """The run's name in the config."""
    config: dict[str, Any]
    """Resolved, as plain data."""
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

    def check(self, args: Sequence[str]) -> Any:
        """The config of `fit ARGS`, each value of its type.

        Raises:
            SystemExit: `fit` refuses it; its line is on the screen.
        """
        return self.parser.parse_args(["fit", *args]).fit


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
    return Base(
        name=str(config.name),
        config=plain_config(config),
        backbone=remove(module.backbone),
        metric=metric,
        goal=goal,
        why_unlogged=lambda metric: why_unlogged(metric, module) if all_known else None,
        trainer=built.trainer,
        parser=built.parser,
    )


def plain_config(config: Any) -> dict[str, Any]:
    """The config in JSON's types, without anything that differs between processes."""
    values = {key: value for key, value in config.as_dict().items() if key not in NOT_COMPARED}
    text = json.dumps(values, default=lambda thing: re.sub(r" at 0x[0-9a-f]+", "", str(thing)))
    return dict(json.loads(text))
