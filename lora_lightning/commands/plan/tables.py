"""A plan as tables for the screen, which read well at 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_lightning.commands.plan.report import Plan
from lora_lightning.lora.formats.atomic_dir import human_size
from lora_lightning.reports.console import short_count


def show(plan: Plan, console: Console) -> None:
    """Print it all."""

    def say(line: Any, **style: Any) -> None:
        console.print(line, soft_wrap=True, **style)

    say(f"{plan.backbone}, {plan.task}: a batch of {plan.batch}")
    for title, table, below in _tables(plan):
        console.print()
        say(title, style="bold")
        console.print(table)
        for line in below:
            say(line)
    for note in plan.notes:
        say(f"note: {note}")


Shown = tuple[str, Table, list[str]]
"""A title, its table, and the lines that stand below it."""


def _tables(plan: Plan) -> Iterator[Shown]:
    yield _adapted(plan)
    if plan.terms:
        yield _formula(plan)
    if plan.memory:
        yield _memory(plan)
    if plan.full is not None:
        yield _work(plan)


def _table(header: Sequence[str], left: int = 1) -> Table:
    """With text in the first `left` columns and figures in the others."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return table


def _adapted(plan: Plan) -> Shown:
    """What trains, and how large it is."""
    header, *rows = plan.report.shown()
    table = _table(header)
    for row in rows:
        table.add_row(*row)
    report = plan.report
    total = f"trainable {report.trainable:,} of {report.total:,} ({report.share:.3%})"
    sizes = {"adapter": plan.adapter_file, "checkpoint": plan.checkpoint, "W0": plan.w0_file}
    files = ", ".join(f"{name} {human_size(size)}" for name, size in sizes.items())
    return "What trains", table, [*report.left_out(), f"{total}; on disk: {files}"]


def _formula(plan: Plan) -> Shown:
    """The paper's formula with this run's numbers in it."""
    table = _table(("kind", "", "A and B"), left=2)
    for term in plan.terms:
        table.add_row(term.name.rpartition("*.")[2], term.formula, f"{term.factors:,}")
    square = sum(term.factors for term in plan.terms if term.is_square)
    other = sum(term.factors for term in plan.terms if not term.is_square)
    rest = plan.report.trainable - square - other
    parts = [f"square {square:,}", f"of other shapes {other:,}" * bool(other), f"beside A and B {rest:,}" * bool(rest)]
    title = "|Theta| = 2 L d_model r for each kind of square matrix (arXiv 2106.09685)"
    return title, table, [f"{' + '.join(filter(None, parts))} = {plan.report.trainable:,}"]


def _memory(plan: Plan) -> Shown:
    """Each precision, and each strategy beside it."""
    n = plan.wanted.processes
    table = _table(("precision", "W0", "A, B", "grads", "optim.", "kept", "at most", f"DDP of {n}", f"FSDP2 of {n}"))
    for row in plan.memory:
        cost, own = row.cost, row.way == plan.wanted.way
        name = "  blocks recomputed" if row.way.checkpointing else row.way.precision
        sizes = (row.w0, row.adapter, cost.gradients, cost.optimizer, cost.kept, cost.peak, row.ddp, row.fsdp2)
        table.add_row(f"{name} *" if own else name, *map(_mb, sizes), style="bold" if own else None)
    below = [
        "* this config's own. kept: activations for backward; at most: all at once, and what is there for a moment"
    ]
    if (process := plan.process()) is not None:
        below.append(
            f"the process on this CPU: about {_mb(process)} MB at most, {_mb(plan.wanted.base)} of them Python and"
            " libraries (fitted, see docs/plan.md)"
        )
    return f"Memory of a step on {plan.wanted.device.type}: MB, of one device, and of each of {n}", table, below


def _work(plan: Plan) -> Shown:
    """Operations beside those of full fine-tuning."""
    assert plan.full is not None
    own, full = plan.own_row().cost, plan.full
    table = _table(("", "forward", "backward", "step", "memory at most"))
    for name, cost in (("LoRA", own), ("full", full)):
        flops = (cost.forward, cost.backward, cost.flops)
        table.add_row(name, *(f"{short_count(count)}FLOP" for count in flops), f"{_mb(cost.peak)} MB")
    pairs = ((own.forward, full.forward), (own.backward, full.backward), (own.flops, full.flops), (own.peak, full.peak))
    table.add_row("share", *(f"{a / b:.2f}" if b else "" for a, b in pairs))
    return "Work of a step, beside full fine-tuning", table, []


def _mb(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:,.1f}"
