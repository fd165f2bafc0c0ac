"""Whose a sweep's folder is: one config, metric, budget and set of flags; other values of these flags add to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lightning.commands.sweep.search_space import plainly
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import write_bytes

BASE = "base.json"


def claim(folder: Path, about: dict[str, Any]) -> None:
    """Note in the folder what it is for, or see that it is for this.

    Args:
        about: plain data, the config under `config`.

    Raises:
        LoRAError: the folder is of another sweep.
    """
    file = folder / BASE
    if not file.is_file():
        write_bytes(file, (json.dumps(about, indent=2) + "\n").encode())
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoRAError(f"'{file}' is damaged ({error}): delete it where the command is the same as before") from error
    if (other := _difference(before, about)) is not None:
        raise LoRAError(
            f"'{folder}' holds a sweep with another {other}: give another --name; other values of the same flags, more"
            " trials and more seeds would be added to it"
        )


def without(config: dict[str, Any], keys: Sequence[str], *, seeds: bool) -> dict[str, Any]:
    """The config less what is swept."""
    found: dict[str, Any] = json.loads(json.dumps(config))
    for key in [*keys, *(["seed_everything"] if seeds else [])]:
        *above, last = key.split(".")
        inner: Any = found
        for part in above:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return found


def _difference(before: Any, now: Any, where: str = "") -> str | None:
    """The first place in which two differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            found = _difference(before.get(key), now.get(key), f"{where}.{key}" if where else key)
            if found is not None:
                return found
        return None
    return None if before == now else f"{where.removeprefix('config.')} ({_short(before)}, now {_short(now)})"


def _short(value: Any) -> str:
    text = plainly(json.dumps(value))
    return text if len(text) < 60 else f"{text[:57]}..."
