"""What is refused before a fit begins: strategies, callbacks, metrics that nothing logs, heads of the wrong size."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, callbacks, strategies
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import Strategy, StrategyRegistry
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
    strategies.FSDPStrategy: f"it gathers all of W0 into its checkpoints, and torch no longer develops FSDP1: {TAKE}",
    strategies.DeepSpeedStrategy: f"it steps on means of micro-batch means, and saves past our checkpoints: {TAKE}",
    strategies.ModelParallelStrategy: f"it leaves the sharding to us, and without it adds up no gradients: {TAKE}",
    callbacks.StochasticWeightAveraging: COPY,
    callbacks.WeightAveraging: COPY,
    callbacks.BackboneFinetuning: "it unfreezes all of W0, which LoRA leaves as it is: leave it out",
    callbacks.ModelPruning: "it writes zeros into W0, which LoRA leaves as it is: prune before, or leave it out",
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


def refuse_unsupported_name(strategy: Any) -> None:
    """Raise for a strategy's name or class path before Lightning builds it, and asks for a GPU or a package in vain."""
    if not isinstance(strategy, str) or strategy.lower() == "auto":
        return
    name, short = strategy.lower(), strategy.rpartition(".")[2]
    registered = {known: StrategyRegistry[known]["strategy"] for known in StrategyRegistry.available_strategies()}
    if "." in strategy or short in strategies.__all__:
        why = _class_refusal(getattr(strategies, short, object))
    elif name in registered:
        why = _class_refusal(registered[name])
    elif (why := FORMER.get(name)) is None:
        names = ["auto", *(known for known, kind in registered.items() if _class_refusal(kind) is None)]
        usual = [known for known in names if not re.search("find_unused|notebook|xla|tpu", known)]
        raise LoRAError(
            f"no strategy '{strategy}'{did_you_mean(name, names)} (there are {', '.join(usual)}, and the overlays in"
            " configs/strategy/)"
        )
    if why:
        raise LoRAError(f"strategy {strategy}: {why}")


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
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if on_cpu and devices and isinstance(devices, list | tuple):
        raise LoRAError(
            f"trainer.devices {list(devices)} names GPUs one by one, and this run is on a CPU, where processes are"
            f" counted: trainer.devices {len(devices)}"
        )


def warn_of_few_cores(trainer: Trainer) -> None:
    """Warn where there are more processes on a CPU than cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
        rank_zero_warn(
            f"{trainer.num_devices} processes share {cores} cores, which is slower than {cores} processes:"
            f" --trainer.devices {cores}"
        )


def refuse_contradictions(config: Any, trainer: Trainer, module: LoRAModule, data: Any) -> None:
    """Raise where the config, the model and the data contradict each other, before anything is trained."""
    refuse_other_count(config, data)
    refuse_other_size(module.backbone, module.task, data)
    refuse_unlogged(trainer, module, config.get("model.lr_scheduler.init_args"))


OF_THE_RUN = re.compile(
    r"epoch|step|train/loss_step|lr(/.+)?|grad_norm/.+|(samples|tokens)/s|(throughput|memory)/.+|val_[^/]+/.+"
)
"""Metrics that Lightning and the default callbacks log, and those of further validation sets, which are known only once
the data are read."""
OURS = "lora_lightning."


def refuse_unlogged(trainer: Trainer, module: LoRAModule, schedule: Mapping[str, Any] | None = None) -> None:
    """Raise where a callback or schedule monitors what nothing logs, or with a mode that takes the worst for the best.

    Where the user's code may log the metric, it is a warning.

    Args:
        schedule: the arguments of the learning rate's schedule; a ReduceLROnPlateau has `monitor` and `mode`.
    """
    watches, user_class = [], user_metrics_class(module)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kind = type(callback)
        is_known = kind.__module__.startswith((OURS, "lightning.pytorch."))
        if not is_known or isinstance(callback, callbacks.LearningRateMonitor):
            user_class = user_class or kind.__name__
        saves = isinstance(callback, callbacks.ModelCheckpoint) and callback.save_top_k != 0
        if saves or (isinstance(callback, callbacks.EarlyStopping) and callback.strict):
            watches.append((kind.__name__, callback.monitor, callback.mode))
    plateau = schedule or {}
    watches.append(("ReduceLROnPlateau", plateau.get("monitor"), plateau.get("mode") or "min"))
    for who, monitor, mode in watches:
        if monitor in (None, "auto"):
            continue
        better, near = module.task.better(monitor), why_unlogged(monitor, module)
        if near is None and better not in (None, mode):
            raise LoRAError(
                f"{who} monitors '{monitor}' with mode {mode}, which takes the worst for the best: set mode to {better}"
            )
        if near is not None and not user_class:
            raise LoRAError(f"{who} monitors '{monitor}', which is not logged{near}")
        if near is not None:
            rank_zero_warn(f"{who} monitors '{monitor}', which is not logged, unless {user_class} does{near}")


def why_unlogged(metric: str, module: LoRAModule) -> str | None:
    """None where the metric is logged; else the end of an error: near misses and the names that are logged."""
    known = [name for stage in ("val", "train") for name in module.task.logged(stage)]
    if metric in known or OF_THE_RUN.fullmatch(metric):
        return None
    return f"{did_you_mean(metric, known)} (logged are {', '.join(known)})"


def user_metrics_class(module: LoRAModule) -> str | None:
    """The user's class, of the module or the task, that may log other metrics."""
    for owner, where in ((module, type(module).__module__), (module.task, type(module.task).update.__module__)):
        if not f"{where}.".startswith(OURS):
            return type(owner).__name__
    return None


def refuse_other_count(config: Any, data: Any) -> None:
    """Raise where a config's `num_classes`, of the task or the backbone, contradicts the data, whose count would win.

    Only this package's classes are compared: a user's class may have a default, which is in the config too.
    """
    count = getattr(data, "num_classes", None)  # data may not know their labels before setup
    for part in ("task", "backbone"):
        configured = config.get(f"model.{part}.init_args.num_classes")
        is_ours = str(config.get(f"model.{part}.class_path")).startswith(OURS)
        if is_ours and None not in (configured, count) and configured != count:
            raise LoRAError(
                f"model.{part}.init_args.num_classes is {configured}, and the data have {count} labels: leave it out"
            )


def refuse_other_size(backbone: Any, task: Task, data: Any = None) -> None:
    """Raise where the head of a transformers model has another size than the task needs.

    Other backbones, and heads whose layers do not tell their size, are checked on the first batch.
    """
    count, sizes = task.wanted_outputs(), list[int]()  # of the head's layers
    modules: dict[str, Any] = dict(backbone.named_modules())
    if count is not None and is_a(backbone, HF_MODEL) and (body := backbone.base_model_prefix) in modules:
        head = (module for name, module in modules.items() if not f"{name}.".startswith(f"{body}."))
        layers = [layer for layer in head if isinstance(layer, nn.Linear | nn.Conv2d)]
        sizes = [layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels for layer in layers]
    if not sizes or count in sizes:
        return
    label_names = getattr(data, "label_names", None) or ()
    label_list = f" ({first_few(list(label_names), 5)})" if label_names else ""
    head_size = backbone.config.num_labels if backbone.config.num_labels in sizes else sizes[-1]
    raise LoRAError(
        f"the backbone's head has {head_size} outputs (num_labels), and there must be {count}, one for each"
        f" {task.output_is}{label_list}: {'leave num_labels out' if label_names else f'num_labels: {count}'}"
    )
