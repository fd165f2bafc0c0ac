"""Merge an adapter into a Hugging Face model from directory to directory, without loading the model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lora_lightning.backbones.checkpoint import CONFIG, BaseFiles, groups_of, main_dtype, name_of
from lora_lightning.backbones.locate import resolve
from lora_lightning.lora.errors import AdapterWarning, LoRAError, first_few
from lora_lightning.lora.formats.atomic_dir import refuse_occupied, stage_folder, write_bytes
from lora_lightning.lora.formats.peft.config import CONFIG as ADAPTER_CONFIG
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.formats.tensor_files import INDEX
from lora_lightning.lora.frozen.dtype import DType, dtype_name, parse_dtype
from lora_lightning.lora.meta.merge_files import StreamedMerge, StreamReport
from lora_lightning.lora.report import rounding_warning

REPORT = "merge_report.json"
"""The report of a merge with the names of its files, which a later merge may replace."""

OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
"""Ends of the names of files that hold W0 in other forms, which must not be copied beside the merged weights."""


def merge_on_disk(
    base_dir: str | Path,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: DType = "auto",
    allow_other_base: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> StreamReport:
    """Write the base with `W0 + s B A` in it, shard by shard, for models that are larger than memory.

    The output is a directory with the base's files and names, and a report, that `AutoModel...from_pretrained` opens.
    Tensors that the adapter does not change are copied bit for bit. All files are written beside `output_dir` and moved
    there in one step. An adapter without a fingerprint of W0, as PEFT writes it, is merged with a warning.

    Args:
        base_dir: a directory in the hub's layout, `config.json` and safetensors; `package:NAME/path` for one inside
            an installed package.
        adapter_dir: a PEFT directory; `package:NAME/path` too.
        output_dir: a new or empty directory, or one of an earlier merge, which is replaced.
        dtype: of the written tensors; `auto` keeps each tensor's. The sum is computed in float32 or wider in any case.
        allow_other_base: merge, with a warning, also where the fingerprint of W0 in the adapter is not the base's.
        alphas: by full module name, where PEFT's `alpha_pattern` is ambiguous, as in `load_adapter`.

    Raises:
        AdapterError: the adapter is torn, does not fit the base, or was made on another one.
        MergeError: the update cannot be folded into W0, or a number is beyond the range of the written dtype.
        LoRAError: the base cannot be read or is quantized; something is in the way; the disk is too small.
    """
    base, adapter, target = Path(resolve(str(base_dir))), Path(resolve(str(adapter_dir))), Path(output_dir)
    to_dtype = parse_dtype(dtype)
    _refuse_target(target, {"base": base, "adapter": adapter})
    plain = BaseFiles(base)  # first, so that errors of the base come before errors of the adapter
    files = AdapterFiles.read(adapter)
    make, heads = plain.maker(files)
    groups = groups_of(make(), plain.checkpoint)
    options: dict[str, Any] = {"dtype": to_dtype, "allow_other_base": allow_other_base, "alphas": alphas}
    merge = StreamedMerge(make, plain.checkpoint, groups, files, **options)
    for key in merge.new:
        if name_of(make(), key) != key:
            raise LoRAError(f"'{key}' would be new and loaded under another name: merge in memory")
    try:
        # with room for headers, tokenizer and config
        with stage_folder(target, merge.size + merge.size // 100 + 2**24) as folder:
            columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            with Progress(*columns, disable=merge.size < 2**29, transient=True) as bar:  # small models need none
                task = bar.add_task("merging", total=merge.size)
                report = merge.write(folder, lambda count: bar.advance(task, count))
            _write_side_files(base, folder, merge, report, heads)
    except OSError as error:
        raise LoRAError(f"'{target}' cannot be written ({error}); it is as it was") from error
    if warning := rounding_warning(report.kept, to_dtype or main_dtype(merge.checkpoint)):
        warnings.warn(warning, AdapterWarning, stacklevel=2)
    return report


def _write_side_files(
    base: Path, folder: Path, merge: StreamedMerge, report: StreamReport, heads: Mapping[str, Any]
) -> None:
    """Write the config, the index and the report, and copy the base's other files that are no weights."""
    for path in sorted(base.rglob("*")):
        inner = path.relative_to(base)
        hidden = any(part.startswith(".") for part in inner.parts)
        ours = path.name.endswith(OTHER_WEIGHTS) or str(inner) in (CONFIG, ADAPTER_CONFIG, REPORT)
        merged = any((base / part / REPORT).is_file() for part in list(inner.parents)[:-1])
        if path.is_file() and not hidden and not ours and not merged:
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inner)
    text = (base / CONFIG).read_text(encoding="utf-8")
    config = json.loads(text)
    # Only the merge's changes: new labels, the class, the dtype, and ties.
    edited = {**config, **heads, "architectures": [type(merge.plain).__name__]}
    if merge.dtype is not None:
        edited["dtype"] = dtype_name(merge.dtype)
        edited.pop("torch_dtype", None)  # the field's older name
    if merge.untied and merge.plain.config.tie_word_embeddings is False:  # type: ignore[union-attr]
        edited["tie_word_embeddings"] = False
        decoder = merge.plain.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
        for name, part in config.items():
            if isinstance(part, dict) and getattr(merge.plain.config, name, None) is decoder:
                edited[name] = {**part, "tie_word_embeddings": False}
    write_bytes(folder / CONFIG, (text if edited == config else _json(edited)).encode())
    if merge.checkpoint.index is not None:
        index: dict[str, Any] = dict(merge.checkpoint.index)
        index["weight_map"] = {key: file for file, keys in report.files.items() for key in sorted(keys)}
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": report.size}
        write_bytes(folder / INDEX, _json(index).encode())
    facts = {name: value for name, value in asdict(report).items() if name != "files"}
    write_bytes(folder / REPORT, _json({**facts, "written": sorted(_files(folder))}).encode())


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _refuse_target(target: Path, read: Mapping[str, Path]) -> None:
    """Raise a LoRAError where writing would delete files that no earlier merge wrote, or an input of this one."""
    refuse_occupied(target, "a merged model", REPORT)
    if (target / REPORT).is_file():
        written = set[str]()  # of a report that cannot be read
        with suppress(ValueError, KeyError, TypeError, OSError):
            written = {*json.loads((target / REPORT).read_text(encoding="utf-8"))["written"]}
        if strangers := sorted(_files(target) - written - {REPORT}):
            raise LoRAError(f"'{target}' holds files that no merge wrote ({first_few(strangers)}): name another folder")
    for what, path in read.items():
        if path.resolve().is_relative_to(target.resolve()):
            raise LoRAError(f"'{target}' holds the {what}, which would go: name another folder")
    if target.resolve().is_relative_to(read["base"].resolve()):
        raise LoRAError(
            f"'{target}' lies in the base, whose later merges would take it for a part: name another folder"
        )


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
