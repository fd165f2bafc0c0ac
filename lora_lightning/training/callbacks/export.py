"""Export the best checkpoint when fit ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lora_lightning.lora.errors import LoRAError
from lora_lightning.training import run
from lora_lightning.training.export import export
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.summary import show_report
from lora_lightning.training.trainer import of_the_data, probe_batch, record_export


class ExportAtEnd(Callback):
    """What `lora-lightning export` does, at the end of fit.

    Args:
        formats: some of `adapter`, `merged`.
        output_dir: where to write; `export/` in the run folder by default.
    """

    def __init__(self, formats: Sequence[str] = ("adapter", "merged"), output_dir: str | None = None) -> None:
        self.formats = list(formats)
        self.output_dir = output_dir

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last checkpoint is written, by one process."""
        folder = run.run_dir(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, LoRAModule):
            raise LoRAError(f"ExportAtEnd exports a LoRAModule, got {type(pl_module).__name__}")
        trained = {k: v.clone() for k, v in pl_module.state_dict().items()}
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if best:
            pl_module.load_state_dict(run.load_checkpoint(best)["state_dict"])
        target = Path(self.output_dir) if self.output_dir else folder / run.EXPORT
        own = of_the_data(trainer.datamodule)  # type: ignore[attr-defined]
        result = export(pl_module, target, batch=_probe(trainer, pl_module), formats=self.formats, **own)
        show_report(record_export(folder, result), Console(), save_svg=folder / "report.svg")
        pl_module.load_state_dict(trained)


def _probe(trainer: Trainer, module: LoRAModule) -> dict[str, Any]:
    """The first validation batch, or training batch where there is no validation, on the module's device."""
    batch = probe_batch(trainer.val_dataloaders or trainer.train_dataloader)
    return {k: v.to(module.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
