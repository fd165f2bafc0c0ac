"""The config of a sweep, parsed as `fit` does, and built without weights where the model comes from the hub.

So `fit`'s errors are raised before the first trial.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from lora_lightning.backbones.huggingface import huggingface
from lora_lightning.cli.build import build_run
from lora_lightning.lora.inject import remove
from lora_lightning.tasks.base import Task
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.preflight import user_metrics_class, why_unlogged

Goal = str
"""`min` or `max`."""
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
    if backbone.get("class_path") and _import_path(backbone.class_path) is huggingface:
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
    goal: Goal
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
    metric, goal = _monitored_metric(config, module.task)
    return Base(
        name=str(config.name),
        config=plain_config(config),
        backbone=remove(module.backbone),
        metric=metric,
        goal=goal,
        why_unlogged=functools.partial(_why_unlogged, module=module, config=config),
        trainer=built.trainer,
        parser=built.parser,
    )


def _why_unlogged(metric: str, module: LoRAModule, config: Any) -> str | None:
    paths = [callback.class_path for callback in _callbacks(config)]
    ours = all(path.startswith(("lora_lightning.", "lightning.pytorch.")) for path in paths)
    return why_unlogged(metric, module) if ours and not user_metrics_class(module) else None


def plain_config(config: Any) -> dict[str, Any]:
    """The config in JSON's types, without anything that differs between processes."""
    values = {key: value for key, value in config.as_dict().items() if key not in NOT_COMPARED}
    text = json.dumps(values, default=lambda thing: re.sub(r" at 0x[0-9a-f]+", "", str(thing)))
    return dict(json.loads(text))


def _monitored_metric(config: Any, task: Task) -> tuple[str, Goal]:
    """The metric that chooses the best checkpoint: a callback's in the config, else the task's."""
    for callback in _callbacks(config):
        args = callback.get("init_args") or {}
        if args.get("monitor") not in (None, "auto") and _is_checkpoint(callback.class_path):
            return str(args["monitor"]), str(args.get("mode") or "min")
    return task.monitor, task.monitor_mode


def _callbacks(config: Any) -> list[Any]:
    callbacks = config.trainer.callbacks or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _is_checkpoint(class_path: str) -> bool:
    from lightning.pytorch.callbacks import ModelCheckpoint

    cls = _import_path(class_path)
    return isinstance(cls, type) and issubclass(cls, ModelCheckpoint)


def _import_path(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
