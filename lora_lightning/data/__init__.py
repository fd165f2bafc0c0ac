"""Where examples come from: one DataModule per kind of input.

`datasets` takes half a second to load, so nothing that needs it is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.data.base import TableData


def table_of(data: Any) -> TableData | None:
    """The DataModule if it is a `TableData`, else None."""
    if data is None:
        return None
    from lora_lightning.data.base import TableData

    return data if isinstance(data, TableData) else None


SPLITS = {"val": "validation", "test": "test", "predict": "predict"}


def set_name(datamodule: Any, stage: str, index: int) -> str:
    """The name of the loader with this number; the first one's is empty.

    It is the DataModule's name of the set where known (`mismatched` of `validation_mismatched`), else the number.
    """
    if not index:
        return ""
    table = table_of(datamodule)
    sets: list[str] = table.sets(SPLITS[stage]) if table is not None else []
    if stage == "predict" and table is not None and not sets:
        sets = table.sets("test")
    named = sets[index].partition("_")[2] if index < len(sets) else ""
    return named.replace(".", "_") or str(index)


def stage_of(datamodule: Any, stage: str, index: int) -> str:
    """The stage under which a task counts the loader with this number: `val`, `val_mismatched`."""
    name = set_name(datamodule, stage, index)
    return f"{stage}_{name}" if name else stage
