"""The config that is swept over, as `fit` would take it: parsed, and built without its weights where it names a hub's.

What `fit` refuses is so refused before the first trial begins.
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
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.inject import remove
from lora_lightning.tasks.base import Task
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.preflight import own_figures_class, why_unlogged

Goal = str
"""`min` or `max`."""
NOT_COMPARED = ("config", "name", "runs_dir", "ckpt_path")
"""Of a fit's config, what a sweep sets itself."""


@functools.wraps(huggingface)
def build_without_weights(*args: Any, **kwargs: Any) -> nn.Module:
    """`huggingface` with no weights: the model's shapes on the meta device."""
    kwargs |= {"random_weights": True, "on_meta": False}
    with torch.device("meta"):
        return huggingface(*args, **kwargs)


def _without_weights(config: Any) -> None:
    """`fit`'s module on the meta device where it comes from a hub, and a start that reads no data."""
    model = config.model
    model.lora["init"], model["init_adapter"] = "gaussian", None
    backbone = model.backbone
    if backbone.get("class_path") and _import_path(backbone.class_path) is huggingface:
        backbone["class_path"] = f"{__name__}.build_without_weights"
    config.trainer["precision"] = None  # which would say how a backbone is to load itself


@dataclass(frozen=True, kw_only=True)
class Base:
    """A config and what it monitors."""

    name: str
    """Of the run that the config describes."""
    config: dict[str, Any]
    """Resolved, as plain data."""
    lora: LoRAConfig
    backbone: nn.Module
    """Plain, without adapters."""
    metric: str
    goal: Goal
    why_unlogged: Callable[[str], str | None]
    """Of a metric: None, or why no fit of this config logs it."""
    trainer: Trainer | None = None
    """Where one was asked for."""
    parser: Any
    """Of the command: what else `fit` is to be asked is looked at with it."""

    def check(self, args: Sequence[str]) -> Any:
        """The config of `fit ARGS`, each value of its type.

        Raises:
            SystemExit: `fit` refuses it; its line is on the screen.
        """
        return self.parser.parse_args(["fit", *args]).fit


def open_base(args: Sequence[str], *, trainer: bool = False) -> Base:
    """What `fit ARGS` would begin with; with `trainer`, a Trainer that says in which processes.

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
        lora=module.lora,
        backbone=remove(module.backbone),
        metric=metric,
        goal=goal,
        why_unlogged=functools.partial(_why_unlogged, module=module, config=config),
        trainer=built.trainer,
        parser=built.parser,
    )


def _why_unlogged(metric: str, module: LoRAModule, config: Any) -> str | None:
    given = config.trainer.callbacks or []
    places = [callback.class_path for callback in (given if isinstance(given, list) else [given])]
    ours = all(place.startswith(("lora_lightning.", "lightning.pytorch.")) for place in places)
    return why_unlogged(metric, module) if ours and not own_figures_class(module) else None


def plain_config(config: Any) -> dict[str, Any]:
    """JSON's types alone, and nothing that another process would write otherwise."""
    values = {key: value for key, value in config.as_dict().items() if key not in NOT_COMPARED}
    text = json.dumps(values, default=lambda thing: re.sub(r" at 0x[0-9a-f]+", "", str(thing)))
    return dict(json.loads(text))


def _monitored_metric(config: Any, task: Task) -> tuple[str, Goal]:
    """What chooses the best checkpoint: a callback of the config, else the task."""
    given = config.trainer.callbacks or []
    for callback in given if isinstance(given, list) else [given]:
        args = callback.get("init_args") or {}
        if args.get("monitor") not in (None, "auto") and _is_checkpoint(callback.class_path):
            return str(args["monitor"]), str(args.get("mode") or "min")
    return task.monitor, task.monitor_mode


def _is_checkpoint(class_path: str) -> bool:
    from lightning.pytorch.callbacks import ModelCheckpoint

    target = _import_path(class_path)
    return isinstance(target, type) and issubclass(target, ModelCheckpoint)


def _import_path(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
