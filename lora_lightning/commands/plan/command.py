"""`lora-lightning plan`: what a config trains and costs, computed on the meta device without weights or data."""

from __future__ import annotations

import json as json_format
import pkgutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_lightning.cli.build import build_run
from lora_lightning.commands.plan.batch import choose_size, make_batch
from lora_lightning.commands.plan.memory import PRECISIONS, Tracer
from lora_lightning.commands.plan.parameter_count import terms_of
from lora_lightning.commands.plan.report import Plan, show
from lora_lightning.commands.plan.step_cost import bytes_of
from lora_lightning.lora.errors import LoRAError, first_line
from lora_lightning.lora.formats.peft.save import adapter_file_bytes
from lora_lightning.lora.frozen.tensors import adapter_bytes, base_tensors
from lora_lightning.lora.targets.blocks import repeated_blocks
from lora_lightning.reports.console import backbone_name
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.precision import lightning_precision

ASSUMED_LABELS = 2
ASSUMED_PROCESSES = 2
UNUSED = ("callbacks", "logger", "strategy", "plugins", "profiler")
"""Parts of the Trainer that a plan does not build."""


def plan_on_screen(fit: Sequence[str], *, json: bool | str, **options: Any) -> None:
    """Make the plan and print it; as JSON alone where `json` is True, and into a file where `json` names one."""
    with redirect_stdout(sys.stderr):  # libraries print beside the plan
        plan = make_plan(fit, **options)
    text = json_format.dumps(plan.to_dict(), indent=2)
    if json is True:
        print(text)
        return
    show(plan, Console())
    if json:
        Path(json).write_text(text + "\n")


def make_plan(
    fit: Sequence[str],
    *,
    batch_size: int | None = None,
    length: int | None = None,
    num_labels: int | None = None,
    precisions: Sequence[str] | None = None,
    processes: int | None = None,
) -> Plan:
    """The plan of `fit ARGS`, whose module is built on the meta device; the other arguments override the config.

    Raises:
        LoRAError: the config cannot be planned.
    """
    notes: list[str] = []
    try:
        with torch.device("meta"):
            run = build_run(["fit", *fit], lambda config: _leave_out_data(config, num_labels, notes), trainer=False)
    except NotImplementedError as error:
        raise LoRAError(f"the backbone cannot be built on the meta device: {first_line(error)}") from error
    module, trainer = run.module, run.config.trainer
    module.set_modes()
    backbone, task = module.backbone, module.task
    on_gpu = str(trainer.accelerator) != "cpu" and torch.cuda.is_available()
    plan = Plan(
        backbone=backbone_name(backbone),
        task=type(task).__name__,
        batch=choose_size(_args(run.config.data), task, backbone, notes, rows=batch_size, length=length),
        precision=_precision(trainer),
        activation_checkpointing=module.training_forward.recomputation is not None,
        strategy=str(getattr(trainer.strategy, "class_path", trainer.strategy)).rpartition(".")[2],
        processes=processes or _processes(trainer),
        device="cuda" if on_gpu else "cpu",
        report=module.report,
        formula=terms_of(backbone, module.report),
        bytes={
            "adapter_file": adapter_file_bytes(backbone, task_type=task.peft_task_type),
            "checkpoint": adapter_bytes(backbone),
            "w0_file": bytes_of(base_tensors(backbone).values()),
        },
        notes=notes,
    )
    shown = [p for p in PRECISIONS if precisions is None or p in (*precisions, plan.precision)]
    try:
        _trace(plan, module, shown)
    except Exception as error:
        reason = first_line(error)
        notes.append(f"memory and operations are not known: the step cannot be run without numbers ({reason})")
    return plan


def _trace(plan: Plan, module: LoRAModule, precisions: Sequence[str]) -> None:
    """Fill in memory and operations.

    Raises:
        Exception: the model cannot run on stand-ins.
    """
    tracer = Tracer(module, make_batch(module.task, module.backbone, plan.batch), torch.device(plan.device))
    recomputed = (False, True) if repeated_blocks(module.backbone) else (False,)
    memory = [tracer.row(precision, on, plan.processes) for precision in precisions for on in recomputed]
    plan.full_fine_tuning = tracer.full(plan.precision)
    plan.memory = memory
    plan.bytes["checkpoint"] += plan.config_row().cost.optimizer


def _leave_out_data(config: Any, num_labels: int | None, notes: list[str]) -> None:
    """Set what a fit reads from its data, from their section of the config, and build neither data nor callbacks."""
    parts = [part.get("init_args") or {} for part in (config.model.task, config.model.backbone)]
    assumed: dict[str, Any] = {"pad_token_id": 0, "tokenizer": PreTrainedTokenizerBase.__new__(PreTrainedTokenizerBase)}
    if any("num_classes" in inner or "label_names" in inner for inner in parts):
        names = _labels(config.data, num_labels, notes)
        assumed |= {"num_classes": ASSUMED_LABELS if names is None else len(names), "label_names": names}
    for inner in parts:
        for name in assumed.keys() & inner.keys():
            inner[name] = assumed[name]
    config.data = None
    for name in UNUSED:
        config.trainer[name] = None


def _labels(data: Any, num_labels: int | None, notes: list[str]) -> list[str] | None:
    """Label names as the data would have them; None where the set has none."""
    cls = pkgutil.resolve_name(data.class_path) if data and data.get("class_path") else None
    if cls is None or hasattr(cls, "label_names"):
        args, fixed = _args(data), getattr(cls, "num_classes", None)
        if names := args.get("label_names") or args.get("label_columns"):
            return list(names)
        num_labels = num_labels or args.get("num_classes") or (fixed if isinstance(fixed, int) else None)
        if num_labels is None:
            num_labels = ASSUMED_LABELS
            notes.append(f"{num_labels} labels are assumed, which the data would tell: --num_labels gives their number")
    return None if num_labels is None else [str(i) for i in range(num_labels)]


def _args(data: Any) -> dict[str, Any]:
    """The arguments of the data's class, from their section of the config, which may be missing."""
    args = data.get("init_args") if data else None
    return args.as_dict() if args else {}


def _precision(trainer: Any) -> str:
    """The config's precision as one of `PRECISIONS`."""
    value = trainer.precision
    precision = str(value if value in PRECISIONS else lightning_precision(value, str(trainer.accelerator)) or "32-true")
    known = {"32-true": "float32", "32": "float32", "16": "16-mixed", "bf16": "bf16-mixed"}
    precision = known.get(precision, precision)
    if precision not in PRECISIONS:
        raise LoRAError(f"plan knows the precisions {', '.join(PRECISIONS)}, got {precision}")
    return precision


def _processes(trainer: Any) -> int:
    """The config's number of processes, or two where it has one."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = [index for index in devices.split(",") if index.strip()]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    count *= int(trainer.num_nodes or 1)
    return count if count > 1 else ASSUMED_PROCESSES
