"""Names for the sets of a run that validates, tests or predicts on several."""

from __future__ import annotations

from typing import Any

from lora_lightning.data.base import TableData

SPLITS = {"val": "validation", "test": "test", "predict": "predict"}


def set_name(datamodule: Any, stage: str, index: int) -> str:
    """What the loader with this number is called beside the first, whose name is empty.

    The DataModule's own name for it where that is known (`mismatched` of `validation_mismatched`), else its number.
    """
    if not index:
        return ""
    sets: list[str] = datamodule.sets(SPLITS[stage]) if isinstance(datamodule, TableData) else []
    if stage == "predict" and isinstance(datamodule, TableData) and not sets:
        sets = datamodule.sets("test")
    named = sets[index].partition("_")[2] if index < len(sets) else ""
    return named.replace(".", "_") or str(index)


def stage_of(datamodule: Any, stage: str, index: int) -> str:
    """The stage by which a task counts the loader with this number: `val`, `val_mismatched`."""
    name = set_name(datamodule, stage, index)
    return f"{stage}_{name}" if name else stage
