"""`lora-lightning plan`: what a config will train and cost, on the meta device, without a weight or a row of data."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_lightning.cli.build import build_run
from lora_lightning.commands.plan.assumptions import Notes, count_in, labels_in, size_in
from lora_lightning.commands.plan.memory import PRECISIONS, Way
from lora_lightning.commands.plan.planned import Plan, Wanted, planned
from lora_lightning.commands.plan.process_memory import resident
from lora_lightning.commands.plan.tables import show
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.precision import lightnings_own

ASSUMED_PROCESSES = 2
UNUSED = ("callbacks", "logger", "strategy", "plugins", "profiler")
"""Parts of the Trainer that a plan reads of and does not make."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command's own flags say over the config."""

    batch_size: int | None = None
    length: int | None = None
    num_labels: int | None = None
    precisions: Sequence[str] | None = None
    processes: int | None = None


def make_plan(fit: Sequence[str], asked: Asked) -> Plan:
    """The plan of `fit ARGS`, whose module is built on the meta device.

    Raises:
        LoRAError: a config that cannot be planned, in one line.
    """
    base, notes = resident(), Notes()
    try:
        with torch.device("meta"):
            run = build_run(["fit", *fit], lambda config: _without_data(config, asked, notes), trainer=False)
    except NotImplementedError as error:
        reason = str(error).strip().partition("\n")[0]
        raise LoRAError(f"the backbone cannot be built on the meta device: {reason}") from error
    module, config = run.module, run.config
    size = size_in(config.data, module.task, module.backbone, notes, batch_size=asked.batch_size, length=asked.length)
    return planned(module, size, _wanted(module, config.trainer, asked, base), notes.lines)


def _without_data(config: Any, asked: Asked, notes: Notes) -> None:
    """Set what the data would hand down, from their section of the config, and make neither them nor callbacks."""
    data = config.data
    for part in (config.model.task, config.model.backbone):
        inner = part.get("init_args") or {}
        told = {"pad_token_id": 0, "tokenizer": _no_tokenizer()}
        if "num_classes" in inner:
            told["num_classes"] = count_in(data, asked.num_labels, notes)
        if "label_names" in inner:
            told["label_names"] = labels_in(data, asked.num_labels, notes)
        for name, value in told.items():
            if name in inner:
                inner[name] = value
    config.data = None
    for name in UNUSED:
        config.trainer[name] = None


def _wanted(module: LoRAModule, trainer: Any, asked: Asked, base: int | None) -> Wanted:
    wanted, accelerator = trainer.precision, str(trainer.accelerator)
    precision = wanted if wanted in PRECISIONS else str(lightnings_own(wanted, accelerator) or "32-true")
    known = {"32-true": "float32", "32": "float32", "16": "16-mixed", "bf16": "bf16-mixed"}
    precision = known.get(str(precision), str(precision))
    if precision not in PRECISIONS:
        raise LoRAError(f"plan knows the precisions {', '.join(PRECISIONS)}, got {precision}")
    on_gpu = accelerator not in ("cpu",) and torch.cuda.is_available()
    shown = tuple(p for p in PRECISIONS if asked.precisions is None or p in (*asked.precisions, precision))
    return Wanted(
        base=None if on_gpu else base,
        precisions=shown,
        way=Way(precision=precision, checkpointing=module.training_forward.recomputation is not None),
        strategy=_strategy(trainer.strategy),
        processes=asked.processes or _processes(trainer),
        device=torch.device("cuda" if on_gpu else "cpu"),
    )


def _strategy(given: Any) -> str:
    return str(getattr(given, "class_path", given)).rpartition(".")[2]


def _processes(trainer: Any) -> int:
    """As the config has it where it names more than one."""
    devices = trainer.devices
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    count *= int(trainer.num_nodes or 1)
    return count if count > 1 else ASSUMED_PROCESSES


def _no_tokenizer() -> PreTrainedTokenizerBase:
    """In place of one: a step reads no texts."""
    return PreTrainedTokenizerBase.__new__(PreTrainedTokenizerBase)


def plan_on_screen(fit: Sequence[str], asked: Asked, *, json: bool | str) -> None:
    """Make the plan and print it; as JSON alone where `json` is True, and into the file that it names."""
    with redirect_stdout(sys.stderr):  # what libraries say goes beside the plan
        made = make_plan(fit, asked)
    text = json_format.dumps(made.to_dict(), indent=2)
    if json is True:
        print(text)
        return
    show(made, Console())
    if json:
        Path(json).write_text(text + "\n")
