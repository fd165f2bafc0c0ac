"""How much of its rank the adapter uses, while it trains."""

from __future__ import annotations

import csv
from dataclasses import astuple
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lora_lightning.analysis.measures import (
    NAMES,
    RankMeasures,
    base_norm,
    measures_of,
    summary,
    whole_base,
    whole_layer,
)
from lora_lightning.lora.frozen.spectrum import update_pairs
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.callbacks.every_n_steps import EveryNSteps
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.tracking.csv_logger import keep_before

FILE = "rank.csv"
HEADER = ["step", "layer", *NAMES]


class RankTelemetry(EveryNSteps):
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
        self.last: dict[str, RankMeasures] = {}
        """The last measures by layer, in rank 0 alone."""
        self._norms: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute W0's norms; in a resumed fit, drop the file's rows after the checkpoint."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, LoRAModule)
        for name, layer in adapted_layers(pl_module.backbone):
            self._norms[name] = base_norm(whole_base(layer))
        file = self._file(trainer)
        if file is not None:
            keep_before(file, trainer.global_step + 1)

    def look(self, trainer: Trainer, module: LoRAModule, step: int) -> None:
        """All processes gather the shards; rank 0 computes and writes."""
        measures: dict[str, RankMeasures] = {}
        for name, layer in adapted_layers(module.backbone):
            matrices = whole_base(layer) if self.amplification else []
            whole = whole_layer(layer)
            if trainer.is_global_zero:
                pairs, scale = update_pairs(whole), layer.lora_settings.scale
                measures[layer.lora_name(name)] = measures_of(pairs, scale, self._norms[name], matrices)
        if not trainer.is_global_zero:
            return
        self.last = measures
        for logger in trainer.loggers:
            logger.log_metrics(summary(list(measures.values())), step=step)
        file = self._file(trainer)
        if file is not None:
            append(file, trainer.global_step, measures)

    def _file(self, trainer: Trainer) -> Path | None:
        folder = run.run_dir(trainer)
        return folder / FILE if folder is not None and trainer.is_global_zero else None


def append(file: Path, step: int, measures: dict[str, RankMeasures]) -> None:
    """Append one row for each layer."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerows([] if handle.tell() else [HEADER])
        writer.writerows([step, name, *(f"{value:.9g}" for value in astuple(m))] for name, m in measures.items())
