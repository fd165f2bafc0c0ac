"""Where examples come from: one DataModule per kind of input.

`datasets` takes half a second to load, so nothing that needs it is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.data.base import TableData


def table_of(data: Any) -> TableData | None:
    """The DataModule, where it is one over a table; None where it is another, or none."""
    if data is None:
        return None
    from lora_lightning.data.base import TableData

    return data if isinstance(data, TableData) else None
