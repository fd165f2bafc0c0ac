"""The folder of a merge on disk: what may be replaced there, and the report by which that is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lora_lightning.lora.errors import LoRAError, some
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.lora.meta.merge_files import StreamReport

REPORT = "merge_report.json"


def refuse_target(target: Path, read: Mapping[str, Path]) -> None:
    """Raise where writing there would take away what is not an earlier merge's, or what is read."""
    if target.is_file():
        raise LoRAError(f"'{target}' is a file: name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not (target / REPORT).is_file():
            raise LoRAError(f"'{target}' is not empty: name an empty or new folder")
        strangers = sorted(_files(target) - _written_before(target))
        if strangers:
            raise LoRAError(f"'{target}' holds files that no merge wrote ({some(strangers)}): name another folder")
    for what, path in read.items():
        if path.resolve().is_relative_to(target.resolve()):
            raise LoRAError(f"'{target}' holds the {what}, which would go: name another folder")
    if target.resolve().is_relative_to(read["base"].resolve()):
        raise LoRAError(
            f"'{target}' lies in the base, whose later merges would take it for a part: name another folder"
        )


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _written_before(folder: Path) -> set[str]:
    """The files that an earlier merge notes as its own."""
    try:
        return {*json.loads((folder / REPORT).read_text(encoding="utf-8"))["written"], REPORT}
    except (ValueError, KeyError, TypeError, OSError):
        return set()


def write_report(folder: Path, report: StreamReport) -> None:
    """What was done, and to which files: so the next merge knows which of them it may replace."""
    facts = {name: value for name, value in asdict(report).items() if name != "files"}
    text = json.dumps({**facts, "written": sorted(_files(folder))}, indent=2, ensure_ascii=False)
    write_bytes(folder / REPORT, (text + "\n").encode())
