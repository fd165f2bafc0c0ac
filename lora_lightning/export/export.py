"""Write a trained backbone to files that other libraries open, and check their outputs against the trained model's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_lightning.export.model_files import is_transformers, processing_of, write_labels
from lora_lightning.export.probe_batch import probe_from
from lora_lightning.export.verification import ExportReport, Proof
from lora_lightning.lora.bank.strength import refuse_strength, scaled
from lora_lightning.lora.errors import LoRAError, MergeError, did_you_mean
from lora_lightning.lora.formats.atomic_dir import refuse_occupied, stage_folder, write_bytes
from lora_lightning.lora.formats.peft.save import save_adapter
from lora_lightning.lora.frozen.dtype import DType, float_dtype, parse_dtype
from lora_lightning.lora.frozen.fingerprint import Fingerprint, fingerprint
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.tasks.base import Task
from lora_lightning.tasks.positions import in_evaluation

FORMATS = ("adapter", "merged")
REPORT = "export_report.json"
SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
"""A size as huggingface_hub's `parse_size_to_int` reads it."""

BESIDE = 32_000_000
"""Bytes for the files beside the weights: tokenizers are up to this large."""


def export(
    backbone: nn.Module,
    task: Task,
    w0: Fingerprint,
    output_dir: str | Path,
    *,
    batch: Mapping[str, Any] | None = None,
    example: Any = None,
    formats: str | Iterable[str] = FORMATS,
    tokenizer: Any = None,
    image_processor: Any = None,
    label_names: list[str] | None = None,
    dtype: DType = "auto",
    max_shard_size: int | str | None = None,
    serving: Literal["vllm"] | None = None,
    scale: float = 1.0,
) -> ExportReport:
    """Write the adapter, the merged model, or both, and compare the outputs of each with the adapted model's.

    The backbone stays adapted, and at most one more copy of its weights is in memory. All files are written beside
    `output_dir` and moved there in one step; after an error `output_dir` is unchanged.

    Args:
        backbone: the adapted model.
        task: says which of a batch's entries are inputs, and what PEFT and transformers call the task.
        w0: the fingerprint of W0 when training started.
        output_dir: a new or empty folder, or that of an earlier export, which is replaced.
        batch: the probe, as the DataModule gives it.
        example: in place of a batch, a LightningModule's `example_input_array`.
        formats: `adapter` (a PEFT directory), `merged` (a transformers directory, or a safetensors file with the
            backbone's keys) or both; in a list, or with commas between.
        tokenizer: saved beside the adapter and the merged model; the backbone's by default.
        image_processor: the same, beside a transformers model.
        label_names: written into the report, beside the adapter, and into the merged model's config, or beside it.
        dtype: of the merged model; `auto` is W0's. The sum is computed in float32 or wider in any case.
        max_shard_size: of a transformers model's weight files, such as `5GB`.
        serving: write the adapter in the form that this server takes.
        scale: the strength of the update, as in `lora.bank.strength.scaled`: it is written into the adapter's alpha.

    Raises:
        LoRAError: an invalid option, a folder in the way that is no export, no probe, or too little space.
        MergeError: W0 moved in training, or the exported model's outputs differ by more than the tolerance.
    """
    wanted, to_dtype = parse_options(formats, dtype, max_shard_size, serving, scale)
    target = Path(output_dir)
    refuse_occupied(target, "an export", REPORT)
    report = ExportReport(str(target), wanted, label_names=label_names, scale=float(scale))
    report.trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    report.total = sum(p.numel() for p in backbone.parameters())
    needed = bytes_needed(backbone, wanted, to_dtype)
    with in_evaluation(backbone), torch.no_grad(), scaled(backbone, scale), stage_folder(target, needed) as folder:
        after = fingerprint(backbone)
        report.w0_before, report.w0_after, report.w0_unchanged = w0.digest, after.digest, w0.digest == after.digest
        if not report.w0_unchanged:
            moved = w0.differences(after)
            raise MergeError(f"W0 moved in training: {len(moved)} tensors, first '{moved[0]}'; nothing was exported")
        proof = Proof(backbone, probe_from(backbone, task, batch, example), report, to_dtype)
        candidates = [tokenizer, image_processor if is_transformers(backbone) else None]
        processing = [part for part in candidates if part is not None] or processing_of(backbone)
        if "adapter" in wanted:
            task_type = task.peft_task_type if is_transformers(backbone) else None
            save_adapter(backbone, folder / "adapter", task_type=task_type, serving=serving)
            for part in processing:
                part.save_pretrained(folder / "adapter")
            write_labels(label_names, folder / "adapter")
            report.adapter_bytes, _ = _weights(folder / "adapter")
            proof.verify_adapter(folder / "adapter")
            report.adapter_dir = str(target / "adapter")
        if "merged" in wanted:
            proof.verify_merged(
                folder / "merged",
                processing=processing,
                label_names=label_names,
                problem_type=task.problem_type,
                max_shard_size=max_shard_size,
            )
            report.merged_bytes, report.merged_files = _weights(folder / "merged")
            report.merged_dir = str(target / "merged")
        write_bytes(folder / REPORT, (json.dumps(asdict(report), indent=2) + "\n").encode())
    return report


def parse_options(
    formats: str | Iterable[str],
    dtype: DType = "auto",
    max_shard_size: int | str | None = None,
    serving: str | None = None,
    scale: float = 1.0,
) -> tuple[list[str], torch.dtype | None]:
    """Each format once, from a list or from names with commas between, and the dtype, None for the backbone's.

    Raises:
        LoRAError: an option has an invalid value, or does not go with another option.
    """
    names = formats.split(",") if isinstance(formats, str) else [str(name) for name in formats]
    wanted, to_dtype = list(dict.fromkeys(name.strip() for name in names if name.strip())), parse_dtype(dtype)
    if "onnx" in wanted:
        raise LoRAError(
            "export writes no ONNX: export merged, and write ONNX from it with torch, as docs/export.md shows"
        )
    if unknown := [name for name in wanted if name not in FORMATS]:
        near = did_you_mean(unknown[0], FORMATS)
        raise LoRAError(f"unknown export format '{unknown[0]}'{near} (known: {', '.join(FORMATS)})")
    if not wanted:
        raise LoRAError(f"no export format given: name some of {', '.join(FORMATS)}")
    is_size = max_shard_size > 0 if isinstance(max_shard_size, int) else SIZE.fullmatch(str(max_shard_size))
    if max_shard_size is not None and not is_size:
        raise LoRAError(f"max_shard_size must be bytes or a size such as 5GB, got {max_shard_size!r}")
    if serving not in (None, "vllm"):
        raise LoRAError(f"serving must be 'vllm' or left out, got {serving!r}{did_you_mean(str(serving), ['vllm'])}")
    if serving is not None and "adapter" not in wanted:
        raise LoRAError(
            f"serving={serving!r} is a form of the adapter, got the formats {','.join(wanted)}: add adapter to them, or"
            " leave serving out"
        )
    refuse_strength(scale)
    if scale == 0:
        raise LoRAError("scale must be above 0, got 0: an export of it would be the base that the run began with")
    return wanted, to_dtype


def bytes_needed(backbone: nn.Module, formats: Iterable[str], dtype: torch.dtype | None) -> int:
    """Roughly the bytes of an export on disk: each tensor once, quantized layers as the plain ones they become."""
    adapter = {id(t): t.numel() * t.element_size() for t in adapter_tensors(backbone).values()}
    needed = BESIDE + 2 * sum(adapter.values())  # PEFT's form may be of twice the rank
    if "merged" in formats:
        floats, sizes = float_dtype(backbone), {}
        for module in backbone.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or id(tensor) in adapter:
                    continue
                if name == "weight" and isinstance(module, nn.Linear) and scheme(module) is not None:
                    sizes[id(tensor)] = module.in_features * module.out_features * (dtype or floats).itemsize
                else:
                    to = dtype if dtype and tensor.is_floating_point() else tensor.dtype
                    sizes[id(tensor)] = tensor.numel() * to.itemsize
        needed += sum(sizes.values())
    return needed


def _weights(folder: Path) -> tuple[int, int]:
    """Bytes and number of the weight files in a folder."""
    files = list(folder.rglob("*.safetensors"))
    return sum(file.stat().st_size for file in files), len(files)
