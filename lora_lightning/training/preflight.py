"""What is refused before a fit begins: strategies, callbacks, metrics that nothing logs, heads of the wrong size."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, strategies
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.lora.errors import LoRAError, did_you_mean, first_few
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.tasks.base import Task
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.strategies.base import ShardedStrategy

TAKE = "take --trainer.strategy fsdp2 (or ddp, where W0 fits on one device)"
COPY = "it keeps another copy of all of W0 and writes it into the checkpoints: leave it out"
INSTEAD: dict[type[Strategy | Callback], str] = {
    FSDPStrategy: f"it gathers all of W0 into its checkpoints, and torch no longer develops FSDP1: {TAKE}",
    DeepSpeedStrategy: f"it steps on means of micro-batch means, and saves past our checkpoints: {TAKE}",
    ModelParallelStrategy: f"it leaves the sharding to us, and without it adds up no gradients: {TAKE}",
    StochasticWeightAveraging: COPY,
    WeightAveraging: COPY,
    BackboneFinetuning: "it unfreezes all of W0, which LoRA leaves as it is: leave it out",
    ModelPruning: "it writes zeros into W0, which LoRA leaves as it is: prune the model before, or leave it out",
}
"""Lightning's own strategies and callbacks that are refused, and why."""
FORMER = dict.fromkeys(("fsdp1", "zero2", "zero3"), f"it is gone: {TAKE}")
"""Names of strategies that this package had before."""


def refuse_unsupported(*parts: Strategy | Callback) -> None:
    """Raise for a strategy that is not supported, or a callback that copies or changes W0."""
    for part in parts:
        if why := _class_refusal(type(part)):
            raise LoRAError(f"{'callback' if isinstance(part, Callback) else 'strategy'} {type(part).__name__}: {why}")


def _class_refusal(kind: type) -> str | None:
    """Why a class is refused, or None; other packages' strategies are accepted."""
    if issubclass(kind, Strategy) and not kind.__module__.startswith("lightning."):
        return None
    return next((why for known, why in INSTEAD.items() if issubclass(kind, known)), None)


def refuse_arguments(strategy: Any, precision: Any, devices: Any, accelerator: Any) -> None:
    """Raise for a Trainer's arguments on which Lightning would fail with other words.

    These are a strategy's name, FSDP2 in 64-true, and a list of devices where there is only a CPU.
    """
    refuse_unsupported_name(strategy)
    sharded = isinstance(strategy, ShardedStrategy) or str(strategy).lower() == "fsdp2"
    if sharded and str(precision) in ("64", "64-true"):
        raise LoRAError(
            f"precision {precision} is not for fsdp2: load the model itself in float64 and leave precision out, or"
            " train with --trainer.strategy ddp"
        )
    listed = list(devices) if isinstance(devices, list | tuple) else None
    if listed and (str(accelerator) == "cpu" or (str(accelerator) == "auto" and not torch.accelerator.is_available())):
        raise LoRAError(
            f"trainer.devices {listed} names GPUs one by one, and this run is on a CPU, where processes are counted:"
            f" trainer.devices {len(listed)}"
        )


def warn_of_few_cores(trainer: Trainer) -> None:
    """Warn where there are more processes on a CPU than cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
        rank_zero_warn(
            f"{trainer.num_devices} processes share {cores} cores, which is slower than {cores} processes:"
            f" --trainer.devices {cores}"
        )


def refuse_unsupported_name(strategy: Any) -> None:
    """Raise for a strategy's name before Lightning builds it and asks for a GPU or a package in vain.

    Args:
        strategy: a Trainer's argument; anything but a name or the path of a class passes.

    Raises:
        LoRAError: the name is unknown, or the strategy is not supported.
    """
    if not isinstance(strategy, str) or strategy.lower() == "auto":
        return
    known = StrategyRegistry.available_strategies()
    short = strategy.rpartition(".")[2]
    if "." in strategy or short in strategies.__all__:
        why = _class_refusal(getattr(strategies, short, object))
    elif strategy.lower() in FORMER:
        why = FORMER[strategy.lower()]
    elif strategy.lower() in known:
        why = _class_refusal(StrategyRegistry[strategy.lower()]["strategy"])
    else:
        names = ["auto", *(name for name in known if _class_refusal(StrategyRegistry[name]["strategy"]) is None)]
        usual = [name for name in names if not re.search("find_unused|notebook|xla|tpu", name)]
        raise LoRAError(
            f"no strategy '{strategy}'{did_you_mean(strategy.lower(), names)} (there are {', '.join(usual)}, and the"
            " overlays in configs/strategy/)"
        )
    if why:
        raise LoRAError(f"strategy {strategy}: {why}")


def refuse_contradictions(config: Any, trainer: Trainer, module: LoRAModule, data: Any) -> None:
    """Raise where the config, the model and the data contradict each other, before anything is trained."""
    refuse_other_count(config, data)
    refuse_other_size(module.backbone, module.task, data)
    refuse_unlogged(trainer, module, config.get("model.lr_scheduler.init_args"))


OF_THE_RUN = re.compile(r"epoch|step|train/loss_step|lr(/.+)?|grad_norm/.+|(samples|tokens)/s|(throughput|memory)/.+")
"""Metrics that Lightning and the default callbacks log."""
OURS = ("lora_lightning.",)
OF_A_FURTHER_SET = re.compile(r"val_[^/]+/.+")
"""Metrics of further validation sets, which are known only once the data are read."""


def refuse_unlogged(trainer: Trainer, module: LoRAModule, schedule: Mapping[str, Any] | None = None) -> None:
    """Compare what callbacks and a schedule monitor with what the task logs.

    Args:
        schedule: the arguments of the learning rate's schedule; a ReduceLROnPlateau has `monitor` and `mode`.

    Raises:
        LoRAError: nothing can log a metric, or the mode takes the worst for the best. Where the user's code may log
            it, it is a warning.
    """
    for who, monitor, mode in _monitored_metrics(trainer, schedule or {}):
        if (near := why_unlogged(monitor, module)) is None:
            if (better := module.task.better(monitor)) not in (None, mode):
                raise LoRAError(
                    f"{who} monitors '{monitor}' with mode {mode}, which takes the worst for the best: set mode to"
                    f" {better}"
                )
            continue
        if user_class := _may_log(trainer, module):
            rank_zero_warn(f"{who} monitors '{monitor}', which is not logged, unless {user_class} does{near}")
        else:
            raise LoRAError(f"{who} monitors '{monitor}', which is not logged{near}")


def why_unlogged(metric: str, module: LoRAModule) -> str | None:
    """None where the metric is logged; else the end of an error: near misses and the names that are logged."""
    known = [name for stage in ("val", "train") for name in module.task.logged(stage)]
    if metric in known or OF_THE_RUN.fullmatch(metric) or OF_A_FURTHER_SET.fullmatch(metric):
        return None
    return f"{did_you_mean(metric, known)} (logged are {', '.join(known)})"


def _monitored_metrics(trainer: Trainer, schedule: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Who monitors a metric, which, and with which mode."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        waits = isinstance(callback, ModelCheckpoint) and callback.save_top_k != 0
        waits = waits or (isinstance(callback, EarlyStopping) and callback.strict)
        if waits and callback.monitor not in (None, "auto"):
            yield type(callback).__name__, callback.monitor, callback.mode
    if schedule.get("monitor") is not None:
        yield "ReduceLROnPlateau", schedule["monitor"], schedule.get("mode") or "min"


def _may_log(trainer: Trainer, module: LoRAModule) -> str | None:
    """The class of a module, task or callback whose metrics are unknown here; None without one."""
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    foreign = [kind for kind in kinds if not kind.__module__.startswith((*OURS, "lightning.pytorch."))]
    foreign += [kind for kind in kinds if issubclass(kind, LearningRateMonitor)]
    return user_metrics_class(module) or next((kind.__name__ for kind in foreign), None)


def user_metrics_class(module: LoRAModule) -> str | None:
    """The user's class, of the module or the task, that may log other metrics."""
    for owner, where in ((module, type(module).__module__), (module.task, type(module.task).update.__module__)):
        if not f"{where}.".startswith(OURS):
            return type(owner).__name__
    return None


def refuse_other_count(config: Any, data: Any) -> None:
    """Raise where a config's `num_classes` contradicts the data, whose count would win silently.

    Only this package's classes are compared: a user's class may have a default, which is in the config too.

    Raises:
        LoRAError: another `num_classes` of the task or the backbone than the data have labels.
    """
    for part in ("task", "backbone"):
        configured = config.get(f"model.{part}.init_args.num_classes")
        ours = str(config.get(f"model.{part}.class_path")).startswith("lora_lightning.")
        if not ours or configured is None:
            continue  # data may not know their labels before setup
        count = getattr(data, "num_classes", None)
        if count is not None and configured != count:
            raise LoRAError(
                f"model.{part}.init_args.num_classes is {configured}, and the data have {count} labels: leave it out"
            )


def refuse_other_size(backbone: Any, task: Task, data: Any = None) -> None:
    """Compare the size of a transformers model's head with what the task needs.

    Other backbones, and heads whose layers do not tell their size, are checked on the first batch.

    Args:
        data: the message lists its label names.

    Raises:
        LoRAError: the sizes differ, with both numbers.
    """
    count = task.wanted_outputs()
    if count is None or not is_a(backbone, HF_MODEL):
        return
    sizes = _sizes_beside_the_body(backbone)
    if not sizes or count in sizes:
        return
    label_names = getattr(data, "label_names", None) or ()
    label_list = f" ({first_few(list(label_names), 5)})" if label_names else ""
    head_size = backbone.config.num_labels if backbone.config.num_labels in sizes else sizes[-1]
    raise LoRAError(
        f"the backbone's head has {head_size} outputs (num_labels), and there must be {count}, one for each"
        f" {task.output_is}{label_list}: {'leave num_labels out' if label_names else f'num_labels: {count}'}"
    )


def _sizes_beside_the_body(backbone: Any) -> list[int]:
    """Output sizes of the head's layers, in order; empty for a model without a head."""
    body = f"{backbone.base_model_prefix}."
    modules = dict(backbone.named_modules())
    if body.rstrip(".") not in modules:
        return []
    head = [module for name, module in modules.items() if not f"{name}.".startswith(body)]
    layers = [module for module in head if isinstance(module, nn.Linear | nn.Conv2d)]
    return [layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels for layer in layers]
