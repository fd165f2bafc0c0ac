"""The options of an export, checked before anything is trained or written."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from lora_lightning.lora.bank.strength import refuse_strength
from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.lora.frozen.dtype import DType, parse_dtype

FORMATS = ("adapter", "merged")
REPORT = "export_report.json"
SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
"""A size as huggingface_hub's `parse_size_to_int` reads it."""


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
