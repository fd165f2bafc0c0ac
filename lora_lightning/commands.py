"""Commands that need no config and no run: functions, whose signatures and docstrings are their `--help`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_lightning.lora.casting import DType
from lora_lightning.lora.stream import StreamReport


def merge(
    base_model: str,
    adapter: str,
    output_dir: str,
    dtype: DType = "auto",
    allow_other_base: bool = False,
    alphas: dict[str, float] | None = None,
) -> None:
    """Write a Hugging Face model with an adapter merged in, shard by shard, without loading the model.

    Peak memory is a few of the model's largest tensors, however large the model is.

    Args:
        base_model: directory of the base in the hub's layout, or `package:NAME/path` inside an installed package.
        adapter: directory of the adapter, as PEFT and this package write it.
        output_dir: a new or empty directory for the merged model, or that of an earlier merge, which is replaced.
        dtype: of the written weights; `auto` keeps each tensor's own. The sum is taken in float32 or wider.
        allow_other_base: merge also where the adapter's fingerprint is of another base.
        alphas: by full module name, where PEFT's `alpha_pattern` leaves one in doubt: the error names the modules.
    """
    from lora_lightning.disk_merge import merge_on_disk

    report = merge_on_disk(
        base_model, adapter, output_dir, dtype=dtype, allow_other_base=allow_other_base, alphas=alphas
    )
    Console().print(merge_table(report, output_dir))


COMMANDS: dict[str, Callable[..., Any]] = {"merge": merge}


def merge_table(report: StreamReport, output_dir: str) -> Table:
    """One fact a row."""
    table = Table(title=f"Merged into {output_dir}", title_justify="left", show_header=False, box=None)
    table.add_row("tensors that hold the update", f"{report.changed:,}")
    table.add_row("tensors copied to the bit", f"{report.copied:,}")
    table.add_row("size", f"{report.size / 1e6:,.1f} MB in {len(report.files)} files")
    checked = "is the one that the adapter was made on" if report.base_checked else "not checked"
    table.add_row("base", checked)
    if report.new:
        table.add_row("new tensors", ", ".join(report.new))
    if report.kept:
        name, share = min(report.kept.items(), key=lambda item: item[1])
        table.add_row("update kept after rounding", f"{share:.1%} at least ({name})")
    return table
