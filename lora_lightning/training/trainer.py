"""Lightning's Trainer with `export`, `best` across processes, and a precision that suits the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.connector import _PRECISION_INPUT  # type: ignore[attr-defined]  # the Trainer's own type
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from rich.console import Console

from lora_lightning.lora.casting import DType
from lora_lightning.training import run
from lora_lightning.training.checkpoint_io import WholeFiles
from lora_lightning.training.export import export
from lora_lightning.training.export_options import FORMATS, checked_options
from lora_lightning.training.first_batch import first_batch, loaders_of
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.page import write_page
from lora_lightning.training.proof import ExportReport
from lora_lightning.training.summary import show_report
from lora_lightning.training.wandb_run import log_export


def best_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """`bf16-mixed` where the hardware multiplies bfloat16 itself; on other CPUs it is slower than float32."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


class LoRATrainer(Trainer):
    """Lightning's Trainer and the `export` command; checkpoint files are whole or absent (`checkpoint_io`).

    Args:
        precision: Lightning's values, or `auto`: bf16 autocast where the hardware has it, else float32.
    """

    def __init__(self, *args: Any, precision: Literal["auto"] | _PRECISION_INPUT | None = None, **kwargs: Any) -> None:
        if precision == "auto":
            precision = best_precision(str(kwargs.get("accelerator", "auto")))
        super().__init__(*args, precision=precision, **kwargs)
        # Sharded strategies write folders in ways of their own, and a plugin of the user's is left in its place.
        if type(getattr(self.strategy, "_checkpoint_io", None)) in (type(None), TorchCheckpointIO):
            self.strategy._checkpoint_io = WholeFiles()

    def export(
        self,
        model: LoRAModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str = "best",
        output_dir: str | None = None,
        formats: str | list[str] = "adapter,merged",
        dtype: DType = "auto",
        max_shard_size: int | str | None = None,
        serving: Literal["vllm"] | None = None,
    ) -> ExportReport:
        """Write a trained run as a PEFT adapter and as a merged model, each compared with the adapted model.

        Args:
            model: the module that the run's config describes.
            datamodule: gives the probe batch, the tokenizer and the labels' names. Without one, or without batches,
                the probe is the module's example_input_array, or drawn from what the backbone's config says.
            ckpt_path: a checkpoint, a run folder, or `best` or `last` of the newest run with this config's name.
            output_dir: where to write; `export/` in the run folder by default. An older export there is replaced
                once the new one has stood its proof.
            formats: some of `adapter`, `merged`, `onnx`, with commas between.
            dtype: of the merged model; `auto` is the backbone's own. Sums are taken in float32 in any case.
            max_shard_size: split a merged transformers model into files of at most this size, such as `5GB`.
            serving: `vllm` writes the adapter with one rank and one alpha for all modules, as vLLM reads them.
        """
        wanted, _ = checked_options(formats, dtype, max_shard_size, serving)
        checkpoint = run.find_checkpoint(ckpt_path)
        content = run.load_checkpoint(checkpoint)
        model.on_load_checkpoint(content)
        model.load_state_dict(content["state_dict"])
        folder = run.run_of_checkpoint(checkpoint)
        target = Path(output_dir) if output_dir else folder / run.EXPORT
        model.to(self.strategy.root_device)
        batch = None if datamodule is None else self._probe(model, datamodule)
        options: dict[str, Any] = {
            "formats": wanted,
            "dtype": dtype,
            "max_shard_size": max_shard_size,
            "serving": serving,
        }
        result = export(model, target, batch=batch, **options, **of_the_data(datamodule))
        show_report(record_export(folder, result), Console(), save_svg=folder / "report.svg")
        log_export(self.loggers, folder, target)
        return result

    def _probe(self, model: LoRAModule, datamodule: LightningDataModule) -> dict[str, Any] | None:
        datamodule.prepare_data()
        datamodule.setup("fit")
        return first_batch(loaders_of(datamodule), model)


def of_the_data(datamodule: Any) -> dict[str, Any]:
    """What an export takes over from a DataModule that has it."""
    return {name: getattr(datamodule, name, None) for name in ("tokenizer", "image_processor", "label_names")}


def record_export(folder: Path, result: ExportReport) -> dict[str, Any]:
    """Put an export's figures into the run's report, in the place of an earlier one's, and return the whole of it."""
    same = [f"{kind}_{what}" for kind in FORMATS for what in ("dir", "bytes")]
    same += ["w0_before", "w0_after", "w0_unchanged", "trainable", "total"]
    values: dict[str, Any] = {name: getattr(result, name) for name in same}
    own = ("formats", "max_abs_diff", "max_rel_diff", "tolerance", "rule", "dtype", "probe", "kept_least", "kept_low")
    values |= {f"export_{name}": getattr(result, name) for name in own}
    values |= {"export_dequantised": len(result.dequantised), "export_layers": len(result.kept)}
    values |= {"export_files": result.merged_files}
    onnx = result.onnx
    values |= {"onnx_max_rel_diff": onnx and onnx.max_rel_diff, "onnx_tolerance": onnx and onnx.tolerance}
    values |= {"share": result.trainable / result.total, "run_dir": str(folder)}
    known = run.update_report(folder, values)
    write_page(folder)
    return known
