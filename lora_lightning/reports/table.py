"""The table of every screen and every page: text cells under a header, or one fact in each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text, which rich prints and the pages' template shows."""

    title: str = ""
    header: Sequence[str] = ()
    """Empty for a table of facts, whose first column names the second."""
    rows: Sequence[Sequence[str]]
    text: Sequence[int] = (0,)
    """The columns with text, which are aligned left; the others have numbers."""
    code: bool = False
    """Whether the first column has names of code, which pages show in a monospaced font."""
    prose: bool = False
    """Whether its texts keep their lines on a page."""
    note: str = ""
    """Text below the table."""

    def __rich__(self) -> RenderableType:
        """The table for `Console().print`."""
        gap = 1 if self.header else 3
        table = RichTable(
            title=Text(self.title) if self.title else None,
            title_justify="left",
            show_header=bool(self.header),
            box=None,
            padding=(0, gap, 0, 0),
        )
        if self.header:
            widest = max((len(row[0]) for row in self.rows), default=0)
            for i, name in enumerate(self.header):
                width = None if i else min(22, widest)
                table.add_column(name, justify="left" if i in self.text else "right", overflow="fold", min_width=width)
        else:
            table.add_column(style="bold", no_wrap=True)
            table.add_column(overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return Group(table, Text(self.note)) if self.note else table
