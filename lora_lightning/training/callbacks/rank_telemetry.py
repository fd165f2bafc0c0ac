"""How much of its rank the adapter uses, while it trains."""

from __future__ import annotations

import csv
import io
from dataclasses import astuple
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lightning.analysis.measures import (
    NAMES,
    RankMeasures,
    base_norm,
    measures_of,
    summary,
    whole_base,
    whole_layer,
)
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.lora.frozen.spectrum import update_pairs
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.checkpoints.loop_state import logged_steps
from lora_lightning.training.module import LoRAModule

FILE = "rank.csv"
HEADER = ["step", "layer", *NAMES]


class RankTelemetry(Callback):
    """Logs what the update `s B A` of each layer is made of, and how large it is beside W0.

    The loggers get the least, the median and the largest over all layers (`rank/relative`, `rank/stable_rank`,
    `rank/energy_top`, `rank/energy_half`, `rank/k90`, `rank/amplification`); each layer's own numbers go to `rank.csv`
    in the run's folder. Computed from A and B, never from B A; W0's norm is taken once. Nothing random is drawn and
    nothing that trains is touched. docs/analyze.md says what each number means and what it costs.

    Args:
        every_n_steps: optimizer steps between two looks; left out, one at each epoch's end.
        amplification: also `||s B A||_F / ||U^T W0 V||_F`, which reads all of W0 once a look: about what a forward of
            r tokens costs, a dequantization where the base is quantized, and a gathering where it is sharded.

    Raises:
        LoRAError: `every_n_steps` below 1.
    """

    def __init__(self, every_n_steps: int | None = None, amplification: bool = True) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise LoRAError(f"RankTelemetry.every_n_steps must be at least 1 or left out, got {every_n_steps}")
        self.every_n_steps, self.amplification = every_n_steps, amplification
        self.last: dict[str, RankMeasures] = {}
        """By layer, what the last look found; in the first process."""
        self._norms: dict[str, float] = {}
        self._step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before the fit what cannot be looked at.

        Raises:
            LoRAError: a module that is no LoRAModule.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, LoRAModule):
            raise LoRAError(f"RankTelemetry looks at a LoRAModule, got {type(pl_module).__name__}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """W0's norms; and in a run that goes on, the file without what comes after the checkpoint."""
        self._step = trainer.global_step
        assert isinstance(pl_module, LoRAModule)
        for name, layer in adapted_layers(pl_module.backbone):
            self._norms[name] = base_norm(whole_base(layer))
        file = self._file(trainer)
        if file is not None:
            keep_until(file, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step that is to be looked at."""
        step = trainer.global_step
        if self.every_n_steps is not None and step != self._step and step % self.every_n_steps == 0:
            self._look(trainer, pl_module, logged_steps(trainer))
        self._step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None:
            # the number of the epoch's last step, as Lightning logs an epoch's figures
            self._look(trainer, pl_module, logged_steps(trainer) - 1)

    def _look(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """All processes bring their shards together; the first one computes and writes."""
        assert isinstance(module, LoRAModule)
        found: dict[str, RankMeasures] = {}
        for name, layer in adapted_layers(module.backbone):
            matrices = whole_base(layer) if self.amplification else []
            one = whole_layer(layer)
            if trainer.is_global_zero:
                pairs, scale = update_pairs(one), layer.lora_settings.scale
                found[layer.lora_name(name)] = measures_of(pairs, scale, self._norms[name], matrices)
        if not trainer.is_global_zero:
            return
        self.last = found
        for logger in trainer.loggers:
            logger.log_metrics(summary(list(found.values())), step=step)
        file = self._file(trainer)
        if file is not None:
            append(file, trainer.global_step, found)

    def _file(self, trainer: Trainer) -> Path | None:
        folder = run.run_dir(trainer)
        return folder / FILE if folder is not None and trainer.is_global_zero else None


def append(file: Path, step: int, found: dict[str, RankMeasures]) -> None:
    """One row for each layer."""
    new = not file.is_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerows([HEADER] if new else [])
        writer.writerows([step, name, *(f"{value:.9g}" for value in astuple(m))] for name, m in found.items())


def keep_until(file: Path, step: int) -> None:
    """Drop rows of later steps, which are made anew, and a row that was torn when the process was killed."""
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    kept = [row for row in rows[1:] if len(row) == len(HEADER) and row[0].isdigit() and int(row[0]) <= step]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([HEADER, *kept])
    write_bytes(file, out.getvalue().encode())
