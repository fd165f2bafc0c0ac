"""A plan as data and on the screen: what trains, the size of its files, the operations and the memory of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from lora_lightning.commands.plan.batch import BatchSize
from lora_lightning.commands.plan.memory import MemoryRow
from lora_lightning.commands.plan.parameter_count import Term
from lora_lightning.commands.plan.step_cost import StepCost
from lora_lightning.lora.formats.atomic_dir import human_size
from lora_lightning.lora.report import InjectionReport
from lora_lightning.reports.console import adapted_rows, short_count
from lora_lightning.reports.table import Table


@dataclass(kw_only=True)
class Plan:
    """Exact counts, and the traced cost of a step."""

    backbone: str
    task: str
    batch: BatchSize
    precision: str
    activation_checkpointing: bool
    strategy: str
    processes: int
    """Number of processes of DDP and FSDP2."""
    device: str
    report: InjectionReport
    formula: list[Term]
    bytes: dict[str, int]
    """`adapter_file`: adapter_model.safetensors with its header. `checkpoint`: what trains, and the optimizer's state.
    `w0_file`: W0 in the backbone's dtype."""
    memory: list[MemoryRow] = field(default_factory=list)
    """Empty where the step could not be traced."""
    full_fine_tuning: StepCost | None = None
    notes: list[str]

    def config_row(self) -> MemoryRow:
        """The row of the config's precision and checkpointing."""
        ours = (self.precision, self.activation_checkpointing)
        return next(row for row in self.memory if (row.precision, row.activation_checkpointing) == ours)

    def costs(self) -> dict[str, StepCost]:
        """A step of LoRA and of full fine-tuning; empty where the step could not be traced."""
        full = self.full_fine_tuning
        return {} if full is None else {"LoRA": self.config_row().cost, "full": full}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        flops: dict[str, int] = {}
        for prefix, cost in zip(("", "full_"), self.costs().values(), strict=False):
            counts = {"forward": cost.forward, "backward": cost.backward, "step": cost.flops}
            flops |= {f"{prefix}{name}": count for name, count in counts.items()}
        values = vars(self) | {
            "batch": asdict(self.batch),
            "adapted": adapted_rows(self.report),
            "formula": [term.to_dict() for term in self.formula],
            "memory": [row.to_dict() for row in self.memory],
            "flops": flops or None,
            "full_fine_tuning": None if self.full_fine_tuning is None else self.full_fine_tuning.to_dict(),
        }
        report = values.pop("report")
        return values | {name: getattr(report, name) for name in ("trainable", "frozen", "total", "share", "saved")}


def show(plan: Plan, console: Console) -> None:
    """Print the plan as tables that read well at 100 columns."""
    console.print(f"{plan.backbone}, {plan.task}: a batch of {plan.batch}", soft_wrap=True)
    for title, table in _tables(plan):
        console.print()
        console.print(title, style="bold", soft_wrap=True)  # in the table it would be folded to a narrow one's width
        console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _tables(plan: Plan) -> Iterator[tuple[str, Table]]:
    yield "What trains", _adapted(plan)
    if plan.formula:
        yield "|Theta| = 2 L d_model r for each kind of square matrix (arXiv 2106.09685)", _formula(plan)
    if plan.memory:
        yield f"Memory of a step on {plan.device}: MB, of one device, and of each of {plan.processes}", _memory(plan)
        yield "Work of a step, beside full fine-tuning", _work(plan)


def _adapted(plan: Plan) -> Table:
    """The modules that train, and the sizes of files."""
    report = plan.report
    header, *rows = report.table()
    total = f"trainable {report.trainable:,} of {report.total:,} ({report.share:.3%})"
    adapter, checkpoint, w0 = map(human_size, plan.bytes.values())
    files = f"adapter {adapter}, checkpoint {checkpoint}, W0 {w0}"
    return Table(header=header, rows=rows, note="\n".join([*report.exclusions(), f"{total}; on disk: {files}"]))


def _formula(plan: Plan) -> Table:
    """The paper's formula with this run's numbers in it."""
    rows = [(term.name.rpartition("*.")[2], term.formula, f"{term.factors:,}") for term in plan.formula]
    square = sum(term.factors for term in plan.formula if term.is_square)
    other = sum(term.factors for term in plan.formula) - square
    total = plan.report.trainable
    parts = {"of other shapes": other, "beside A and B": total - square - other}
    sums = [f"square {square:,}", *(f"{name} {count:,}" for name, count in parts.items() if count)]
    return Table(header=("kind", "", "A and B"), rows=rows, text=(0, 1), note=f"{' + '.join(sums)} = {total:,}")


def _memory(plan: Plan) -> Table:
    """The memory of each precision, under each strategy."""
    rows, configs = [], plan.config_row()
    for row in plan.memory:
        cost = row.cost
        name = "  blocks recomputed" if row.activation_checkpointing else row.precision
        sizes = (row.w0, row.adapter, cost.gradients, cost.optimizer, cost.kept, cost.peak)
        cells = map(_mb, (*sizes, row.ddp_peak, row.fsdp2_peak))
        rows.append((f"{name} *" if row is configs else name, *cells))
    note = "* this config's own. kept: activations for backward; at most: all at once, and what is there for a moment"
    strategies = (f"DDP of {plan.processes}", f"FSDP2 of {plan.processes}")
    header = ("precision", "W0", "A, B", "grads", "optim.", "kept", "at most", *strategies)
    return Table(header=header, rows=rows, note=note)


def _work(plan: Plan) -> Table:
    """The operations of LoRA and of full fine-tuning, and LoRA's share of each."""
    counts = {name: (cost.forward, cost.backward, cost.flops, cost.peak) for name, cost in plan.costs().items()}
    rows = [
        (name, *(f"{short_count(n)}FLOP" for n in flops), f"{_mb(peak)} MB") for name, (*flops, peak) in counts.items()
    ]
    shares = (f"{lora / full:.2f}" if full else "" for lora, full in zip(*counts.values(), strict=True))
    return Table(header=("", "forward", "backward", "step", "memory at most"), rows=[*rows, ("share", *shares)])


def _mb(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:,.1f}"
