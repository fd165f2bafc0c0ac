"""Export the best checkpoint when fit ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from lora_lightning.export.export import FORMATS, REPORT, export, parse_options
from lora_lightning.export.probe_batch import first_batch
from lora_lightning.export.verification import ExportReport
from lora_lightning.lora.formats.atomic_dir import refuse_occupied
from lora_lightning.lora.formats.peft.layout import fold_for_vllm, layer_layouts, vllm_targets
from lora_lightning.lora.frozen.dtype import DType
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.reports.console import show_report
from lora_lightning.reports.html import write_page
from lora_lightning.training.callbacks.run_report import RunReport
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import LoRAModule, lora_module
from lora_lightning.training.strategies.base import is_sharded


class ExportAtEnd(Callback):
    """Does at the end of fit what `lora-lightning export` does, and logs the comparison's figures.

    Args:
        formats: `adapter`, `merged` or both, as a list or separated by commas.
        output_dir: where to write; `export/` in the run folder by default.
        dtype: of the merged model; `auto` is the backbone's. Sums are taken in float32 in any case.
        max_shard_size: split a merged transformers model into files of at most this size, such as `5GB`.
        serving: `vllm` writes the adapter with one rank and one alpha for all modules, as vLLM reads them.

    Options, the target folder and the server's limits are checked before the fit.

    Raises:
        LoRAError: an option has a value that means nothing.
    """

    def __init__(
        self,
        formats: str | Sequence[str] = FORMATS,
        output_dir: str | None = None,
        dtype: DType = "auto",
        max_shard_size: int | str | None = None,
        serving: Literal["vllm"] | None = None,
    ) -> None:
        wanted, _ = parse_options(formats, dtype, max_shard_size, serving)
        self.output_dir = output_dir
        self.options = {"formats": wanted, "dtype": dtype, "max_shard_size": max_shard_size, "serving": serving}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise before the fit where the export would fail after it; nothing is wrapped or sharded yet."""
        if stage != "fit":
            return
        backbone = lora_module(pl_module, self).backbone
        if (folder := run.run_dir(trainer)) is not None:
            refuse_occupied(Path(self.output_dir or folder / run.EXPORT), "an export", REPORT)
        if self.options["serving"] == "vllm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the export shows them
                vllm_targets(backbone, fold_for_vllm(backbone, layer_layouts(backbone)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export in one process, after the last checkpoint is written."""
        folder, module = run.dir_to_write(trainer), lora_module(pl_module, self)
        if folder is None:
            return
        if is_sharded(module.backbone):
            rank_zero_warn(f"nothing was exported: W0 lies in parts; run lora-lightning export --ckpt_path {folder}")
            return
        batch = first_batch([trainer.val_dataloaders, trainer.train_dataloader], module)
        data, callbacks = trainer.datamodule, trainer.callbacks  # type: ignore[attr-defined]
        target = Path(self.output_dir or folder / run.EXPORT)
        console = Console(quiet=any(isinstance(c, RunReport) for c in callbacks))  # which shows all
        with best_in(trainer, module):
            result = export_module(module, data, folder, target, batch, console, **self.options)
        for logger in trainer.loggers:
            logger.log_metrics(result.metrics(), step=trainer.global_step)
            logger.save()


def export_module(
    module: LoRAModule, datamodule: Any, folder: Path, target: Path, batch: Any, console: Console, **options: Any
) -> ExportReport:
    """Export the backbone with the DataModule's preprocessing beside it; show and record the figures."""
    names = ("tokenizer", "image_processor", "label_names")
    preprocessing: dict[str, Any] = {name: getattr(datamodule, name, None) for name in names}
    w0, example = module.w0_fingerprint(), module.example_input_array
    result = export(module.backbone, module.task, w0, target, batch=batch, example=example, **options, **preprocessing)
    show_report(record_export(folder, result), console)
    return result


def record_export(folder: Path, result: ExportReport) -> dict[str, Any]:
    """Write an export's figures into the run's report, and return the whole report.

    Where the run's folder cannot be written, as on a read-only disk, this warns and the export stands.
    """
    values = {**result.facts(), "run_dir": str(folder)}
    try:
        report = run.update_report(folder, values)
        write_page(folder)
    except OSError as error:
        rank_zero_warn(f"the export is whole, and the run's report in '{folder}' is as it was: {error.strerror}")
        return values
    return report


@contextmanager
def best_in(trainer: Trainer, module: LoRAModule) -> Iterator[bool]:
    """Within the block the module has the best checkpoint's adapter, then its last; yields whether both are equal."""
    last = {key: tensor.detach().clone() for key, tensor in adapter_tensors(module.backbone).items()}
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    try:
        if best:
            module.load_state_dict(run.load_checkpoint(best)["state_dict"])
        yield all(torch.equal(last[key], tensor) for key, tensor in adapter_tensors(module.backbone).items())
    finally:
        for key, tensor in adapter_tensors(module.backbone).items():
            tensor.data.copy_(last[key])
