"""A plan as tables for the screen, which read well at 100 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lora_lightning.commands.plan.planned import Plan
from lora_lightning.lora.formats.atomic_dir import human_size
from lora_lightning.reports.console import short_count


def show(plan: Plan, console: Console) -> None:
    """Print it all."""
    console.print(f"{plan.backbone}, {plan.task}: a batch of {plan.batch.told()}", soft_wrap=True)
    for made in (adapted_table(plan), formula_table(plan), memory_table(plan), work_table(plan)):
        if made is not None:
            table, below = made
            title, table.title = table.title, None  # which would be folded to the width of a narrow table
            console.print()
            console.print(title, style="bold", soft_wrap=True)
            console.print(table)
            if below:
                console.print(below, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return table


Shown = tuple[Table, str]
"""A table, and what stands below it."""


def adapted_table(plan: Plan) -> Shown:
    """What trains, and how large it is."""
    header, *rows = plan.report.shown()
    table = _table("What trains", *header)
    for row in rows:
        table.add_row(*row)
    return table, (
        f"trainable {plan.report.trainable:,} of {plan.report.total:,} ({plan.report.share:.3%}); on disk: adapter"
        f" {human_size(plan.adapter_file)}, checkpoint {human_size(plan.checkpoint)}, W0 {human_size(plan.w0_file)}"
    )


def formula_table(plan: Plan) -> Shown | None:
    """The paper's formula with this run's numbers in it."""
    if not plan.terms:
        return None
    table = _table("|Theta| = 2 L d_model r for each kind of square matrix (arXiv 2106.09685)", "kind", "", "A and B")
    table.columns[1].justify = "left"
    for term in plan.terms:
        table.add_row(term.name.rpartition("*.")[2], term.formula, f"{term.factors:,}")
    square = sum(term.factors for term in plan.terms if term.is_square)
    other = sum(term.factors for term in plan.terms if not term.is_square)
    rest = plan.report.trainable - square - other
    parts = [f"square {square:,}", f"of other shapes {other:,}" * bool(other), f"beside A and B {rest:,}" * bool(rest)]
    return table, f"{' + '.join(filter(None, parts))} = {plan.report.trainable:,}"


def memory_table(plan: Plan) -> Shown | None:
    """Each precision, and each strategy beside it."""
    if not plan.memory:
        return None
    n = plan.wanted.processes
    columns = ("W0", "A, B", "grads", "optim.", "kept", "at most", f"DDP of {n}", f"FSDP2 of {n}")
    title = f"Memory of a step on {plan.wanted.device.type}: MB, of one device, and of each of {n}"
    table = _table(title, "precision", *columns)
    for row in plan.memory:
        cost, own = row.cost, row.way == plan.wanted.way
        name = "  blocks recomputed" if row.way.checkpointing else row.way.precision
        sizes = (row.w0, row.adapter, cost.gradients, cost.optimizer, cost.kept, cost.peak, row.ddp, row.fsdp2)
        table.add_row(f"{name} *" if own else name, *map(_mb, sizes), style="bold" if own else None)
    told = "* this config's own. kept: activations for backward; at most: all at once, and what is there for a moment"
    if (process := plan.process()) is not None and plan.wanted.base is not None:
        told += (
            f"\nthe process on this CPU: about {_mb(process)} MB at most, {_mb(plan.wanted.base)} of them Python and"
            " libraries (fitted, see docs/plan.md)"
        )
    return table, told


def work_table(plan: Plan) -> Shown | None:
    """Operations beside those of full fine-tuning."""
    if plan.full is None:
        return None
    own, full = plan.own_row().cost, plan.full
    table = _table("Work of a step, beside full fine-tuning", "", "forward", "backward", "step", "memory at most")
    for name, cost in (("LoRA", own), ("full", full)):
        sizes = (cost.forward, cost.backward, cost.flops)
        table.add_row(name, *(f"{short_count(size)}FLOP" for size in sizes), f"{_mb(cost.peak)} MB")
    shares = [f"{a / b:.2f}" if b else "" for a, b in ((own.forward, full.forward), (own.backward, full.backward))]
    table.add_row(
        "share", *shares, f"{own.flops / full.flops:.2f}" if full.flops else "", f"{own.peak / full.peak:.2f}"
    )
    return table, ""


def _mb(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:,.1f}"
