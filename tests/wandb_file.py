"""Reads what W&B wrote into an offline run's `.wandb` file: no server, no `wandb sync`.

A 7-byte header (`:W&B`, then 2 + 1 bytes of magic and version), then LevelDB's log: blocks of 32,768 bytes, the first
one counted from the file's start. In a block each piece has a header `<IHB`: the CRC-32 of its kind and its bytes,
their number, and the kind (1 whole, 2 first, 3 middle, 4 last of a record); what is left over of a block is zeros. A
record is a `wandb.proto.wandb_internal_pb2.Record`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER, BLOCK, PIECE = 7, 32_768, struct.Struct("<IHB")


def payloads(data: bytes) -> Iterator[bytes]:
    """Each whole record's bytes; ends where a killed process stopped writing."""
    assert data[:4] == b":W&B"
    place, parts = HEADER, b""
    while place + PIECE.size <= len(data):
        room = BLOCK - place % BLOCK
        if room < PIECE.size:
            place += room
            continue
        _, length, kind = PIECE.unpack_from(data, place)
        piece = data[place + PIECE.size : place + PIECE.size + length]
        if kind == 0 or len(piece) < length:
            return
        parts = piece if kind in (1, 2) else parts + piece
        place += PIECE.size + length
        if kind in (1, 4):
            yield parts


@dataclass
class Tracked:
    """What is in one file."""

    id: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row for each call of `log`, with W&B's own `_step` and Lightning's `trainer/global_step`."""
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    """The files of each, by its name and aliases: `NAME:ALIAS,ALIAS`."""
    exit_code: int | None = None
    """None where the process was killed."""

    def points(self, name: str) -> dict[int, Any]:
        """A metric by `trainer/global_step`."""
        return {row["trainer/global_step"]: row[name] for row in self.history if name in row}


def read_run(file: Path) -> Tracked:
    """All of one `.wandb` file, in plain values."""
    from wandb.proto.wandb_internal_pb2 import Record

    run = Tracked()
    for payload in payloads(file.read_bytes()):
        record = Record()
        record.ParseFromString(payload)
        match record.WhichOneof("record_type"):
            case "run":
                run.id, run.project = record.run.run_id, record.run.project
                run.config |= _values(record.run.config.update)
            case "config":
                run.config |= _values(record.config.update)
            case "history":
                run.history.append(_values(record.history.item))
            case "summary":
                run.summary |= _values(record.summary.update)
            case "artifact":
                run.artifacts |= _files(record.artifact)
            case "request" if record.request.HasField("log_artifact"):
                run.artifacts |= _files(record.request.log_artifact.artifact)
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _files(made: Any) -> dict[str, list[str]]:
    return {f"{made.name}:{','.join(made.aliases)}": [entry.path for entry in made.manifest.contents]}


def runs_in(folder: Path) -> list[Tracked]:
    """Every run under a logger's `save_dir`, in the order in which they began."""
    files = sorted((folder / "wandb").glob("*run-*/run-*.wandb"), key=lambda file: file.parent.name)
    return [read_run(file) for file in files]
