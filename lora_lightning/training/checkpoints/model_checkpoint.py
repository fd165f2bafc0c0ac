"""Writes `best.ckpt` by the task's metric and `last.ckpt` as the newest state, and saves on SIGTERM."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.training.checkpoints.file_io import is_remote
from lora_lightning.training.checkpoints.loop_state import is_between_steps, place_of
from lora_lightning.training.strategies.collectives import reduce_number

REQUEUE = 75
"""Exit code of a pre-empted fit: EX_TEMPFAIL of sysexits.h, "try again later"."""


class PreemptedError(SystemExit):
    """SIGTERM came, the state is saved, and the fit can be resumed."""


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint for the best, and beside it the newest state, from which a fit resumes exactly.

    `last.ckpt` is written after every epoch and its validation, after a validation in an epoch's middle, every
    `save_every` optimizer steps, and after the step in which SIGTERM came; the fit then ends with exit code
    `exit_code`. (Lightning's own `last.ckpt` is written with the best only.)

    Args:
        save_every: optimizer steps between two `last.ckpt`; by default an epoch's.
        monitor: the metric that says what is best; `auto` is the task's, or none where nothing is validated: then
            the newest is the best.
        mode: whether `monitor` should become `min` or `max`; for `auto` the task says it.
        dirpath: where to write; `checkpoints/` in the run's folder by default.
        exit_code: of a process that was sent SIGTERM and has saved.

    Raises:
        LoRAError: numbers that mean nothing.
    """

    def __init__(
        self,
        save_every: int | None = None,
        monitor: str | None = "auto",
        mode: str = "min",
        dirpath: str | None = None,
        exit_code: int = REQUEUE,
    ) -> None:
        if save_every is not None and save_every < 1:
            raise LoRAError(f"save_every must be at least 1 optimizer step, got {save_every}")
        if not 0 < exit_code < 256:
            raise LoRAError(f"exit_code must be 1 to 255, so that the scheduler starts the fit again; got {exit_code}")
        super().__init__(
            filename="best", save_last=True, enable_version_counter=False, monitor=monitor, mode=mode, dirpath=dirpath
        )
        self.save_every, self.exit_code = save_every, exit_code
        self._sent_sigterm = self._leaves = self._overdue = False
        self._fits = True
        self._newest = (-1, "")
        self._steps = 0

    @property
    def state_key(self) -> str:
        """One key for all settings, so that a resumed fit finds the state."""
        return "ModelCheckpoint"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Monitor the task's metric."""
        self._fits = stage == "fit"
        if self.monitor == "auto":
            task = getattr(pl_module, "task", None)
            validated = trainer.limit_val_batches != 0 and getattr(trainer.datamodule, "has_validation", True)  # type: ignore[attr-defined]
            self.monitor = getattr(task, "monitor", None) if validated else None
            self.mode = getattr(task, "monitor_mode", "min")
            self.kth_value = torch.tensor(float("inf") if self.mode == "min" else -float("inf"))
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on SIGTERM waits for the end of a step. Before, it ends the process: there is nothing to save."""
        super().on_train_start(trainer, pl_module)
        self._sent_sigterm = self._leaves = self._overdue = False
        self._newest = (trainer.global_step, "")
        self._steps = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.ask_to_leave)  # Lightning restores the handler from before

    def ask_to_leave(self, *signal_and_frame: object) -> None:
        """Save after the running step, and end the fit; the handler of SIGTERM."""
        self._sent_sigterm = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave after the last step's metrics were logged."""
        if self._leaves:
            self._leave(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save in an epoch's middle. Where a validation or the epoch's end follows, a later hook saves."""
        if is_between_steps(trainer) or trainer.global_step == self._steps:
            return  # between steps, or where a loss scaler has skipped one
        self._steps = trainer.global_step
        place = place_of(trainer)
        if place.kind == "epoch" or place.validates_next:
            return
        self._leaves = self._is_asked_to_leave(trainer)
        due = self._overdue or (self.save_every is not None and self._steps % self.save_every == 0)
        if due or self._leaves or self._steps == trainer.max_steps:
            self._save_newest(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        place = place_of(trainer) if training else None
        self._overdue = place is not None and not place.at_step
        self.save_last = not self._overdue  # between two steps there are gradients, which no file holds
        super().on_validation_end(trainer, pl_module)
        self.save_last = True
        if place is not None and place.kind == "batch" and place.at_step:
            self._leaves = self._is_asked_to_leave(trainer)
            self._save_newest(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished epoch, with all that was done at its end."""
        self._save_newest(trainer)
        if self._is_asked_to_leave(trainer):
            self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last epoch, which no other follows; what was saved in its middle at `max_steps` stays."""
        if self._newest != (trainer.global_step, "batch"):
            self._save_newest(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After Ctrl-C, say how to go on."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == TrainerFn.FITTING:
            saved = "nothing is saved yet: --save_every N saves every N steps"
            if self.last_model_path:
                saved = f"the same command with --ckpt_path {self.last_model_path} goes on from step {self._newest[0]}"
            rank_zero_warn(f"stopped by Ctrl-C after step {trainer.global_step}; {saved}")

    def _save_newest(self, trainer: Trainer) -> None:
        now = (trainer.global_step, place_of(trainer).kind)
        if trainer.fast_dev_run or not now[0] or self._newest in (now, (now[0], "")):  # type: ignore[attr-defined]
            return  # nothing has changed since the last save, or since this fit began
        last_saved = self._last_global_step_saved
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved = last_saved  # Lightning saves no best at a step at which it has saved
        self._newest, self._overdue = now, False

    def _is_asked_to_leave(self, trainer: Trainer) -> bool:
        """Whether any process was sent SIGTERM; all must leave after the same step."""
        return bool(reduce_number(trainer, self._sent_sigterm, "max"))

    def _leave(self, trainer: Trainer) -> None:
        rank_zero_warn(
            f"SIGTERM: all is saved in '{self.last_model_path}' after step {trainer.global_step}; the same command"
            " with --ckpt_path last, or auto, goes on from there"
        )
        # One process of each machine has the code: a launcher that sees others fail would kill the first.
        raise PreemptedError(self.exit_code if trainer.local_rank == 0 else 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best so far, also where this fit writes to another folder than the one that it resumes."""
        if not self._fits:
            return  # a test or a prediction saves nothing
        state = dict(state_dict)
        if state.get("best_model_path") and state.get("monitor") != self.monitor:
            rank_zero_warn(
                f"the best so far was by {state['monitor']} and stays in the checkpoint's folder: this fit begins anew"
                f" with {self.monitor}"
            )
            return
        if self.dirpath is not None and not is_remote(self.dirpath) and state.get("best_model_path"):
            here, best = Path(self.dirpath), Path(state["best_model_path"])
            path = str(target := here / best.name)
            moved = target.exists()  # with the run's folder, or it was written here
            if best.exists() and not (moved and best.samefile(target)) and getattr(rank_zero_only, "rank", 0) == 0:
                write_bytes(target, best.read_bytes())
            if moved or best.exists():
                scores = dict(zip([path], state["best_k_models"].values(), strict=False))
                state |= {
                    "dirpath": self.dirpath,
                    "best_model_path": path,
                    "best_k_models": scores,
                    "kth_best_model_path": path if scores else "",
                    "last_model_path": str(here / Path(state["last_model_path"] or "last.ckpt").name),
                }
        super().load_state_dict(state)
