"""A plan as tables for the screen, which read well at 100 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from lora_lightning.commands.plan.report import Plan
from lora_lightning.lora.formats.atomic_dir import human_size
from lora_lightning.reports.console import short_count
from lora_lightning.reports.table import Table


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    console.print(f"{plan.backbone}, {plan.task}: a batch of {plan.batch}", soft_wrap=True)
    for title, table in _tables(plan):
        console.print()
        console.print(title, style="bold", soft_wrap=True)  # in the table it would be folded to a narrow one's width
        console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _tables(plan: Plan) -> Iterator[tuple[str, Table]]:
    yield "What trains", _adapted_table(plan)
    if plan.terms:
        yield "|Theta| = 2 L d_model r for each kind of square matrix (arXiv 2106.09685)", _formula(plan)
    if plan.memory:
        n, device = plan.wanted.processes, plan.wanted.device.type
        yield f"Memory of a step on {device}: MB, of one device, and of each of {n}", _memory(plan, n)
    if plan.full is not None:
        yield "Work of a step, beside full fine-tuning", _work(plan)


def _adapted_table(plan: Plan) -> Table:
    """The modules that train, and the sizes of files."""
    report = plan.report
    header, *rows = report.table()
    total = f"trainable {report.trainable:,} of {report.total:,} ({report.share:.3%})"
    sizes = {"adapter": plan.adapter_file, "checkpoint": plan.checkpoint, "W0": plan.w0_file}
    files = ", ".join(f"{name} {human_size(size)}" for name, size in sizes.items())
    return Table(header=header, rows=rows, note="\n".join([*report.exclusions(), f"{total}; on disk: {files}"]))


def _formula(plan: Plan) -> Table:
    """The paper's formula with this run's numbers in it."""
    rows = [(term.name.rpartition("*.")[2], term.formula, f"{term.factors:,}") for term in plan.terms]
    square = sum(term.factors for term in plan.terms if term.is_square)
    other = sum(term.factors for term in plan.terms if not term.is_square)
    rest = plan.report.trainable - square - other
    parts = [f"square {square:,}", f"of other shapes {other:,}" * bool(other), f"beside A and B {rest:,}" * bool(rest)]
    note = f"{' + '.join(filter(None, parts))} = {plan.report.trainable:,}"
    return Table(header=("kind", "", "A and B"), rows=rows, text=(0, 1), note=note)


def _memory(plan: Plan, n: int) -> Table:
    """The memory of each precision, under each strategy."""
    rows = []
    for row in plan.memory:
        cost = row.cost
        name = "  blocks recomputed" if row.way.checkpointing else row.way.precision
        sizes = (row.w0, row.adapter, cost.gradients, cost.optimizer, cost.kept, cost.peak, row.ddp, row.fsdp2)
        rows.append((f"{name} *" if row.way == plan.wanted.way else name, *map(_mb, sizes)))
    note = "* this config's own. kept: activations for backward; at most: all at once, and what is there for a moment"
    header = ("precision", "W0", "A, B", "grads", "optim.", "kept", "at most", f"DDP of {n}", f"FSDP2 of {n}")
    return Table(header=header, rows=rows, note=note)


def _work(plan: Plan) -> Table:
    """The operations of LoRA and of full fine-tuning."""
    assert plan.full is not None
    lora, full = plan.config_row().cost, plan.full
    rows = []
    for name, cost in (("LoRA", lora), ("full", full)):
        flops = (cost.forward, cost.backward, cost.flops)
        rows.append((name, *(f"{short_count(count)}FLOP" for count in flops), f"{_mb(cost.peak)} MB"))
    pairs = (
        (lora.forward, full.forward),
        (lora.backward, full.backward),
        (lora.flops, full.flops),
        (lora.peak, full.peak),
    )
    rows.append(("share", *(f"{a / b:.2f}" if b else "" for a, b in pairs)))
    return Table(header=("", "forward", "backward", "step", "memory at most"), rows=rows)


def _mb(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:,.1f}"
