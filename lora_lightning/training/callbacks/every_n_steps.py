"""The base of callbacks that measure the model every n optimizer steps, or at each epoch's end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints.loop_state import logged_steps
from lora_lightning.training.module import LoRAModule


class EveryNSteps(Callback):
    """Calls `look`, which a subclass implements, in every process.

    Args:
        every_n_steps: optimizer steps between two calls; None calls it at each epoch's end.

    Raises:
        LoRAError: `every_n_steps` below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise LoRAError(f"{type(self).__name__}.every_n_steps must be at least 1 or left out, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._step = -1

    def look(self, trainer: Trainer, module: LoRAModule, step: int) -> None:
        """Measure the model, and log under the number `step`."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise before the fit where the model cannot be measured.

        Raises:
            LoRAError: a module that is no LoRAModule.
        """
        if stage == "fit" and not isinstance(pl_module, LoRAModule):
            raise LoRAError(f"{type(self).__name__} looks at a LoRAModule, got {type(pl_module).__name__}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip the step that a fit resumes from: it was measured before."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call `look` after every n-th optimizer step."""
        step = trainer.global_step
        if self.every_n_steps is not None and step != self._step and step % self.every_n_steps == 0:
            assert isinstance(pl_module, LoRAModule)  # see setup
            self.look(trainer, pl_module, logged_steps(trainer))
        self._step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None:
            assert isinstance(pl_module, LoRAModule)  # see setup
            # the number of the epoch's last step, as Lightning logs an epoch's figures
            self.look(trainer, pl_module, logged_steps(trainer) - 1)
