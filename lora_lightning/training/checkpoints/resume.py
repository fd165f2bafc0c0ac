"""Law 8: a resumed run is the uninterrupted run, bit for bit. What Lightning's checkpoints lack for that, and no more.

Lightning keeps the adapter, the optimizer, the schedules, the scaler, the counts of its loops and the loaders' places.
This callback adds each process's random states, the training metrics in an epoch's middle, the last logged metrics, and
whether a fit had ended early. docs/resume.md says what is exact and what is not.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from lora_lightning.lora.errors import first_few
from lora_lightning.tasks.base import Task
from lora_lightning.training.checkpoints import loop_state
from lora_lightning.training.checkpoints.adapter_state import RESUME_KEY
from lora_lightning.training.strategies.collectives import gather
from lora_lightning.training.tracking.loggers import ContinuedCSVLogger, runs_of

MOVES = {"base_lrs", "last_epoch", "best", "num_bad_epochs", "cooldown_counter"}
MOVES |= {"_last_lr", "_step_count", "_get_lr_called_within_step", "_is_initial"}
"""Entries of a schedule's state that are progress, or the optimizer's: no settings."""


class Resume(Callback):
    """Saves and restores what makes a resumed fit the uninterrupted one; on by default in the command."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._settings: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read this run's settings before a checkpoint's state replaces them."""
        self._settings = settings_of(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gather all processes' states; Lightning writes rank 0's checkpoint."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        place = loop_state.place_of(trainer)
        figures = {
            name: {"state": move_data_to_device(dict(metric.metric_state), "cpu"), "updates": metric.update_count}
            for name, metric in (_train_metrics(pl_module) if place.kind == "batch" else ())
        }
        checkpoint["loops"]["fit_loop"] = loop_state.canonical_state(checkpoint["loops"]["fit_loop"], place)
        checkpoint[RESUME_KEY] = {
            "kind": place.kind,
            "at_step": place.at_step,
            "validates_next": place.validates_next,
            "processes": gather({"random": random_state(), "figures": copy.deepcopy(figures)}),
            "metrics": {k: v.detach().cpu() for k, v in trainer.callback_metrics.items()},
            "plateaus": plateaus_due(trainer, place),
            "settings": self._settings,
            "ended_early": [trainer.max_epochs, trainer.max_steps] if trainer.should_stop else None,
            "loggers": runs_of(trainer.loggers),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._loaded = checkpoint.get(RESUME_KEY)
        if self._loaded is None:
            rank_zero_warn(
                "this checkpoint holds no random states: it was written without the callback Resume, so the fit goes on"
                " from it, and not bit for bit as if it had not been interrupted"
            )
        elif self._loaded["ended_early"] == [trainer.max_epochs, trainer.max_steps]:
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the resume is not exact, and let the run's log go on from the checkpoint's step."""
        loop_state.restore_loader_places(trainer)
        if self._loaded is None:
            return
        trainer.callback_metrics.update(self._loaded["metrics"])
        for sentence in reasons_against(self._loaded, trainer.world_size, loop_state.restarting_loaders(trainer)):
            rank_zero_warn(f"{sentence}: the fit goes on, and not bit for bit as if it had not been interrupted")
        for name, value in self._loaded["settings"].items():
            now, then = self._settings.get(name), _plain(value)  # a checkpoint of an earlier version has tuples
            if now is not None and then != now:
                rank_zero_info(f"resumed: the checkpoint's {name} {then} wins over this run's {now}")
        self._settings = self._settings | self._loaded["settings"]
        steps = next_log_step(self._loaded, loop_state.logged_steps(trainer))
        for logger in trainer.loggers:
            if isinstance(logger, ContinuedCSVLogger):
                logger.go_on_from(steps)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore between two epochs, before the loader uses random numbers."""
        if self._loaded is None or self._loaded["kind"] != "epoch":
            return
        for number, value in self._loaded["plateaus"].items():
            trainer.lr_scheduler_configs[number].scheduler.step(value)  # type: ignore[call-arg]
        self._put_back(trainer, pl_module)
        loop_state.begin_epoch_anew(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore in an epoch's middle, after the loader has begun."""
        if self._loaded is not None:
            self._put_back(trainer, pl_module)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GradientAccumulationScheduler):
                    callback.on_train_epoch_start(trainer)  # Lightning leaves the hook out here

    def _put_back(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._loaded is not None
        states, self._loaded = self._loaded["processes"], None
        loop_state.forget_restart(trainer)  # else Lightning steps no ReduceLROnPlateau at this epoch's end
        if trainer.world_size != len(states):
            return
        state = states[trainer.global_rank]
        for name, metric in _train_metrics(module):
            if name in state["figures"]:  # else it starts anew
                for key, value in move_data_to_device(state["figures"][name]["state"], metric.device).items():
                    setattr(metric, key, value)
                metric._update_count, metric._computed = state["figures"][name]["updates"], None
        set_random_state(state["random"])


def next_log_step(place: Mapping[str, Any], stepped: int) -> int:
    """The number under which the first step after a checkpoint is logged, from the checkpoint's place and count."""
    return stepped + int(place["kind"] == "batch" and place["at_step"])


def _train_metrics(module: LightningModule) -> Iterator[tuple[str, Metric]]:
    """The task's training metrics by name."""
    if isinstance(task := getattr(module, "task", None), Task):
        collection: Any = task.metrics["train_"]
        yield "losses", task.losses["train_"]  # type: ignore[misc]
        yield from ((f"metrics.{n}", metric) for n, metric in collection.items(keep_base=True, copy_state=False))


def plateaus_due(trainer: Trainer, place: loop_state.Place) -> dict[int, Any]:
    """The values that ReduceLROnPlateau schedules get at this epoch's end, by the schedules' numbers.

    Lightning steps them after the hook in which an epoch's checkpoint is written.
    """
    epochs = trainer.fit_loop.epoch_progress.current
    if place.kind != "epoch" or epochs.completed == place.epochs:
        return {}
    return {
        number: trainer.callback_metrics[str(config.monitor)].detach().cpu()
        for number, config in enumerate(trainer.lr_scheduler_configs)
        if isinstance(config.scheduler, ReduceLROnPlateau)
        and config.interval == "epoch"
        and place.epochs % config.frequency == 0
        and config.monitor in trainer.callback_metrics
    }


def reasons_against(state: Mapping[str, Any], processes: int, anew: list[str]) -> Iterator[str]:
    """Why this resume cannot be exact. `anew` names loaders that cannot resume in an epoch's middle."""
    if state["kind"] == "batch" and anew:
        yield (
            f"the checkpoint lies in the middle of an epoch, whose rows {first_few(anew)} begins anew: it does not keep"
            " its place, as lora_lightning.ResumableLoader with an EpochSampler does"
        )
    if processes != len(state["processes"]):
        yield f"the checkpoint was written by {len(state['processes'])} processes and is read by {processes}"
    if not state["at_step"]:
        yield "the checkpoint lies between the batches of one optimizer step, whose gradients it does not hold"
    if state["validates_next"]:
        yield "the checkpoint was written right before a validation, which is left out"


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """The settings of optimizers and schedules as plain values by name."""
    settings: dict[str, Any] = {}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            values = {key: value for key, value in group.items() if key not in ("params", "name", "initial_lr")}
            values["lr"] = group.get("initial_lr", group["lr"])  # schedules do not change initial_lr
            of = f" of {group['name']}" if "name" in group else ""
            settings |= {f"{key}{of}": value for key, value in values.items()}
    for config in trainer.lr_scheduler_configs:
        settings |= {f"schedule's {k}": v for k, v in config.scheduler.state_dict().items() if k not in MOVES}
    plain = ((key, _plain(value)) for key, value in settings.items())
    return {key: value for key, value in plain if value is not None}


def _plain(value: Any) -> Any:
    """Numbers, text and lists of them; None for anything else."""
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return None if None in parts else parts
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    return value if isinstance(value, bool | int | float | str) else None


def random_state() -> dict[str, Any]:
    """The random states of Python, numpy, torch on the CPU and on this process's GPU."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = {torch.cuda.current_device(): torch.cuda.get_rng_state()}
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for cuda in state.get("cuda", {}).values():  # this process's device may have another number now
            torch.cuda.set_rng_state(cuda.cpu())
