"""What an export takes of a DataModule, and what it tells the run's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_lightning.export.options import FORMATS
from lora_lightning.export.verification import ExportReport
from lora_lightning.reports.page import write_page
from lora_lightning.training.checkpoints import run_folder as run


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
