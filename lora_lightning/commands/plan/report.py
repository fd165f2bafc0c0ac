"""A plan as data: what trains, the size of its files, the operations and the memory of a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lora_lightning.commands.plan.dummy_batch import BatchSize, batch_for
from lora_lightning.commands.plan.memory import PRECISIONS, MemoryRow, Tracer, Way
from lora_lightning.commands.plan.parameter_count import Term, terms_of
from lora_lightning.commands.plan.step_cost import StepCost
from lora_lightning.lora.formats.peft.save import adapter_file_bytes
from lora_lightning.lora.frozen.tensors import adapter_bytes, base_tensors
from lora_lightning.lora.report import InjectionReport
from lora_lightning.lora.targets.blocks import repeated_blocks
from lora_lightning.reports.console import adapted_rows, backbone_name
from lora_lightning.training.module import LoRAModule


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan uses of a config beside the module."""

    way: Way
    """The config's."""
    strategy: str
    processes: int
    """Number of processes of DDP and FSDP2."""
    device: torch.device
    precisions: tuple[str, ...] = PRECISIONS


@dataclass(kw_only=True)
class Plan:
    """Exact counts, and the traced cost of a step."""

    backbone: str
    task: str
    batch: BatchSize
    wanted: PlanOptions
    report: InjectionReport
    terms: list[Term]
    adapter_file: int
    """Bytes of `adapter_model.safetensors`, header included."""
    checkpoint: int
    """Bytes of a checkpoint's tensors: what trains, and the optimizer's state."""
    w0_file: int
    """Bytes of W0 in the backbone's dtype."""
    memory: list[MemoryRow] = field(default_factory=list)
    full: StepCost | None = None
    """A step of full fine-tuning."""
    notes: list[str] = field(default_factory=list)

    def config_row(self) -> MemoryRow:
        """The row of the config's precision and checkpointing."""
        return next(row for row in self.memory if row.way == self.wanted.way)

    def flops(self) -> dict[str, int] | None:
        """Operations of a step of LoRA and of full fine-tuning; None where the step could not be traced."""
        if self.full is None:
            return None
        lora, full = self.config_row().cost, self.full
        return {
            **{"forward": lora.forward, "backward": lora.backward, "step": lora.flops},
            **{"full_forward": full.forward, "full_backward": full.backward, "full_step": full.flops},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        wanted, report = self.wanted, self.report
        return {
            "backbone": self.backbone,
            "task": self.task,
            "batch": asdict(self.batch),
            "precision": wanted.way.precision,
            "activation_checkpointing": wanted.way.checkpointing,
            "strategy": wanted.strategy,
            "processes": wanted.processes,
            "device": str(wanted.device),
            "adapted": adapted_rows(report),
            **{name: getattr(report, name) for name in ("trainable", "frozen", "total", "share", "saved")},
            "formula": [term.to_dict() for term in self.terms],
            "bytes": {"adapter_file": self.adapter_file, "checkpoint": self.checkpoint, "w0_file": self.w0_file},
            "memory": [row.to_dict() for row in self.memory],
            "flops": self.flops(),
            "full_fine_tuning": None if self.full is None else self.full.to_dict(),
            "notes": self.notes,
        }


def plan_of(module: LoRAModule, size: BatchSize, wanted: PlanOptions, notes: list[str]) -> Plan:
    """Count parameters and files, and trace a step in every precision."""
    backbone = module.backbone
    module.set_modes()
    base = {id(t): t for t in base_tensors(backbone).values()}.values()
    plan = Plan(
        backbone=backbone_name(backbone),
        task=type(module.task).__name__,
        batch=size,
        wanted=wanted,
        report=module.report,
        terms=terms_of(backbone, module.report),
        adapter_file=adapter_file_bytes(backbone, task_type=module.task.peft_task_type),
        checkpoint=adapter_bytes(backbone),
        w0_file=sum(t.numel() * t.element_size() for t in base),
        notes=notes,
    )
    _trace(plan, module)
    return plan


def _trace(plan: Plan, module: LoRAModule) -> None:
    """Fill in the memory and the operations; where the model cannot run on stand-ins, add a note."""
    wanted = plan.wanted
    try:
        tracer = Tracer(module, batch_for(module.task, module.backbone, plan.batch), wanted.device)
        recomputed = (False, True) if repeated_blocks(module.backbone) else (False,)
        ways = [Way(precision=precision, checkpointing=on) for precision in wanted.precisions for on in recomputed]
        plan.memory = [tracer.row(way, wanted.processes) for way in ways]
        plan.full = tracer.full(wanted.way.precision)
    except Exception as error:
        plan.memory = []
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        plan.notes.append(f"memory and operations are not known: the step cannot be run without numbers ({reason})")
        return
    plan.checkpoint += plan.config_row().cost.optimizer
