"""Export the best checkpoint when fit ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lora_lightning.lora.adapter import adapter_tensors
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training import run
from lora_lightning.training.export import DType, export
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.summary import show_report
from lora_lightning.training.trainer import of_the_data, probe_batch, record_export


class ExportAtEnd(Callback):
    """What `lora-lightning export` does, at the end of fit; its figures go to the run's loggers too.

    Args:
        formats: some of `adapter`, `merged`, `onnx`.
        output_dir: where to write; `export/` in the run folder by default.
        dtype: of the merged model; `auto` is the backbone's own. Sums are taken in float32 in any case.
        max_shard_size: split a merged transformers model into files of at most this size, such as `5GB`.
        serving: `vllm` writes the adapter with one rank and one alpha for all modules, as vLLM reads them.
    """

    def __init__(
        self,
        formats: Sequence[str] = ("adapter", "merged"),
        output_dir: str | None = None,
        dtype: DType = "auto",
        max_shard_size: int | str | None = None,
        serving: Literal["vllm"] | None = None,
    ) -> None:
        self.output_dir = output_dir
        self.options: dict[str, Any] = {"formats": list(formats), "dtype": dtype, "max_shard_size": max_shard_size}
        self.options["serving"] = serving

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last checkpoint is written, by one process."""
        folder = run.run_dir(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, LoRAModule):
            raise LoRAError(f"ExportAtEnd exports a LoRAModule, got {type(pl_module).__name__}")
        target = Path(self.output_dir) if self.output_dir else folder / run.EXPORT
        batch = probe_batch(trainer.val_dataloaders or trainer.train_dataloader, pl_module.device)
        own = of_the_data(trainer.datamodule)  # type: ignore[attr-defined]
        with _best(trainer, pl_module):
            result = export(pl_module, target, batch=batch, **self.options, **own)
        show_report(record_export(folder, result), Console(), save_svg=folder / "report.svg")
        for logger in trainer.loggers:
            logger.log_metrics(result.metrics(), step=trainer.global_step)
            logger.save()


@contextmanager
def _best(trainer: Trainer, module: LoRAModule) -> Iterator[None]:
    """The best checkpoint's adapter in the module, then again the one that training ended with."""
    ended = {key: tensor.detach().clone() for key, tensor in adapter_tensors(module.backbone).items()}
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    try:
        if best:
            module.load_state_dict(run.load_checkpoint(best)["state_dict"])
        yield
    finally:
        for key, tensor in adapter_tensors(module.backbone).items():
            tensor.data.copy_(ended[key])
