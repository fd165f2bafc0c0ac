"""Callbacks that measure the model every n optimizer steps, or at each epoch's end: rank and drift."""

from __future__ import annotations

import csv
from dataclasses import astuple
from typing import Any

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lightning.analysis import measures as rank
from lora_lightning.analysis.drift import Batch, measure_drift
from lora_lightning.analysis.drift_inputs import choose_texts, run_batches, text_batches
from lora_lightning.analysis.spectra import update_pairs
from lora_lightning.export.probe_batch import loaders_of
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.checkpoints.loop_state import is_between_steps, logged_steps
from lora_lightning.training.module import LoRAModule, lora_module
from lora_lightning.training.strategies.collectives import gather
from lora_lightning.training.tracking.loggers import keep_before

FILE = "rank.csv"
HEADER = ["step", "layer", *rank.NAMES]


class Monitor(Callback):
    """Logs the figures of `measure`, which a subclass implements; its arguments are `RankTelemetry`'s."""

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise LoRAError(f"{type(self).__name__}.every_n_steps must be at least 1 or left out, got {every_n_steps}")
        self.every_n_steps = every_n_steps

    def measure(self, trainer: Trainer, module: LoRAModule) -> dict[str, float]:
        """The figures to log, in all processes, since a sharded model needs them all; loggers write in the first."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise before the fit for a module that is no LoRAModule."""
        if stage == "fit":
            lora_module(pl_module, self)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.every_n_steps and not is_between_steps(trainer) and trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module, logged_steps(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None:
            # the number of the epoch's last step, as Lightning logs an epoch's figures
            self._log(trainer, pl_module, logged_steps(trainer) - 1)

    def _log(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        figures = self.measure(trainer, lora_module(module, self))
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)


class RankTelemetry(Monitor):
    """Logs the spectrum of each layer's update `s B A`, and its size relative to W0.

    The loggers get the minimum, the median and the maximum over all layers (`rank/relative`, `rank/stable_rank`,
    `rank/energy_top`, `rank/energy_half`, `rank/k90`, `rank/amplification`); each layer's numbers go to `rank.csv` in
    the run's folder. Computed from A and B, never from B A; W0's norm is taken once. Weights and random states do not
    change. docs/analyze.md says what each number means and what it costs.

    Args:
        every_n_steps: optimizer steps between two measurements; by default one at each epoch's end.
        amplification: also `||s B A||_F / ||U^T W0 V||_F`, which reads all of W0 each time: it costs about a forward
            of r tokens, dequantizes a quantized base and gathers a sharded one.

    Raises:
        LoRAError: `every_n_steps` below 1.
    """

    def __init__(self, every_n_steps: int | None = None, amplification: bool = True) -> None:
        super().__init__(every_n_steps)
        self.amplification = amplification
        self.last: dict[str, rank.RankMeasures] = {}
        """The last measures by layer, in rank 0 alone."""
        self._norms: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute W0's norms; in a resumed fit, drop the file's rows after the checkpoint."""
        layers = adapted_layers(lora_module(pl_module, self).backbone)
        self._norms = {name: rank.base_norm(rank.whole_base(layer)) for name, layer in layers}
        if (folder := run.dir_to_write(trainer)) is not None:
            keep_before(folder / FILE, trainer.global_step + 1)

    def measure(self, trainer: Trainer, module: LoRAModule) -> dict[str, float]:
        """All processes gather the shards; rank 0 computes and writes."""
        measured: dict[str, rank.RankMeasures] = {}
        for name, layer in adapted_layers(module.backbone):
            matrices, whole = rank.whole_base(layer) if self.amplification else [], rank.whole_layer(layer)
            if trainer.is_global_zero:
                pairs, scale = update_pairs(whole), layer.lora_settings.scale
                measured[layer.lora_name(name)] = rank.measures_of(pairs, scale, self._norms[name], matrices)
        if not trainer.is_global_zero:
            return {}
        self.last = measured
        if (folder := run.dir_to_write(trainer)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / FILE).open("a", newline="", encoding="utf-8") as file:
                writer, step = csv.writer(file), trainer.global_step
                writer.writerows([] if file.tell() else [HEADER])
                writer.writerows([step, name, *(f"{x:.9g}" for x in astuple(m))] for name, m in measured.items())
        return rank.summary(list(measured.values()))


class DriftMonitor(Monitor):
    """Logs how far the model has moved from its base, which is the model with its adapter switched off.

    For causal language models `drift/kl`, the mean KL(base || adapted) per token, `drift/perplexity_base`,
    `drift/perplexity` and `drift/changed`, the share of tokens whose top prediction changed; for others `drift/cosine`,
    one minus the cosine of the pooled output, and `drift/relative_l2`. Weights and random states do not change.
    docs/analyze.md says what each metric means.

    Args:
        every_n_steps: optimizer steps between two measurements; by default one at each epoch's end.
        texts: a file of texts, a set, `neutral` for this package's own text, or `run` for inputs of the validation
            set. Left out, `neutral` for a causal language model and `run` for others.
        text_column: the column with the texts.
        count: texts or inputs at most.

    Raises:
        LoRAError: a number below 1.
    """

    def __init__(
        self, every_n_steps: int | None = None, texts: str | None = None, text_column: str = "text", count: int = 32
    ) -> None:
        super().__init__(every_n_steps)
        if count < 1:
            raise LoRAError(f"DriftMonitor.count must be at least 1, got {count}")
        self.texts, self.text_column, self.count = texts, text_column, count
        self.last: dict[str, float] = {}
        """The last measurement."""
        self._texts: list[str] | None = None
        self._batches: list[Batch] = []
        self._names: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise before the fit where the drift cannot be measured."""
        if stage == "fit":
            task, data = lora_module(pl_module, self).task, trainer.datamodule  # type: ignore[attr-defined]
            _, self._texts = choose_texts(self.texts, task, data, column=self.text_column, most=self.count)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the batches on the module's device, the same in every process."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module, tokenizer = lora_module(pl_module, self), getattr(data, "tokenizer", None)
        task, backbone = module.task, module.backbone
        if self._texts is not None:
            self._names = self._texts
            self._batches = text_batches(self._texts, tokenizer, task, backbone, getattr(data, "max_length", None))
            return
        loader = next(loaders_of(data))
        first = loader[0] if isinstance(loader, list | tuple) else loader
        batches = [trainer.precision_plugin.convert_input(move_data_to_device(b, module.device)) for b in first]
        self._batches, self._names = run_batches(batches, task, backbone, tokenizer, self.count)
        # A sharded model runs in all processes at once; one of them may have a batch less.
        self._batches = self._batches[: min(gather(len(self._batches)))]

    def measure(self, trainer: Trainer, module: LoRAModule) -> dict[str, float]:
        """The drift's means."""
        forward = trainer.precision_plugin.forward_context
        (drift,) = measure_drift(module.backbone, self._batches, self._names, forward=forward).values()
        self.last = {f"drift/{name}": mean.value for name, mean in drift.figures.items()}
        return self.last
