"""`lora-lightning plan`: what a config trains and costs, computed on the meta device without weights or data."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_lightning.cli.build import build_run
from lora_lightning.commands.plan.assumptions import ASSUMED_LABELS, Notes, labels_in, size_in
from lora_lightning.commands.plan.memory import PRECISIONS, Way
from lora_lightning.commands.plan.report import Plan, PlanOptions, plan_of
from lora_lightning.commands.plan.tables import show
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.precision import lightning_precision

ASSUMED_PROCESSES = 2
UNUSED = ("callbacks", "logger", "strategy", "plugins", "profiler")
"""Parts of the Trainer that a plan does not build."""


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
    notes = Notes()
    try:
        with torch.device("meta"):
            run = build_run(["fit", *fit], lambda config: _leave_out_data(config, num_labels, notes), trainer=False)
    except NotImplementedError as error:
        reason = str(error).strip().partition("\n")[0]
        raise LoRAError(f"the backbone cannot be built on the meta device: {reason}") from error
    module, trainer = run.module, run.config.trainer
    size = size_in(run.config.data, module.task, module.backbone, notes, batch_size=batch_size, length=length)
    on_gpu = str(trainer.accelerator) != "cpu" and torch.cuda.is_available()
    precision = _precision(trainer)
    wanted = PlanOptions(
        precisions=tuple(p for p in PRECISIONS if precisions is None or p in (*precisions, precision)),
        way=Way(precision=precision, checkpointing=module.training_forward.recomputation is not None),
        strategy=str(getattr(trainer.strategy, "class_path", trainer.strategy)).rpartition(".")[2],
        processes=processes or _processes(trainer),
        device=torch.device("cuda" if on_gpu else "cpu"),
    )
    return plan_of(module, size, wanted, notes)


def _leave_out_data(config: Any, num_labels: int | None, notes: Notes) -> None:
    """Set what a fit reads from its data, from their section of the config, and build neither data nor callbacks."""
    parts = [part.get("init_args") or {} for part in (config.model.task, config.model.backbone)]
    assumed: dict[str, Any] = {"pad_token_id": 0, "tokenizer": PreTrainedTokenizerBase.__new__(PreTrainedTokenizerBase)}
    if any("num_classes" in inner or "label_names" in inner for inner in parts):
        names = labels_in(config.data, num_labels, notes)
        assumed |= {"num_classes": ASSUMED_LABELS if names is None else len(names), "label_names": names}
    for inner in parts:
        for name in assumed.keys() & inner.keys():
            inner[name] = assumed[name]
    config.data = None
    for name in UNUSED:
        config.trainer[name] = None


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
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    count *= int(trainer.num_nodes or 1)
    return count if count > 1 else ASSUMED_PROCESSES


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
