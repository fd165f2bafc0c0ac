"""`lora-lightning plan`: what a config will train and cost, on the meta device, without a weight or a row of data."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_lightning.cli.config_files import check
from lora_lightning.cli.main import LoRACLI
from lora_lightning.cli.parser import GIVEN
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


class PlanCLI(LoRACLI):
    """The parser of `fit`, with the data's part in the model settled without them."""

    plan: Plan

    def __init__(self, args: ArgsType = None) -> None:
        self.notes = Notes()
        super().__init__(args=args, run=False)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Under the command's own name."""
        told = (
            "What a config will train and cost: counts, files, memory in each precision and under each strategy,"
            " operations. Takes the config and the flags of fit; reads no weights and no data."
        )
        return super().init_parser(**{**kwargs, "prog": "lora-lightning plan", "description": told})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of `fit`, and the plan's own."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="An argument of fit, not looked at here."
        )
        parser.add_argument("--weights_only", type=bool | None, default=None, help="As ckpt_path.")
        parser.add_argument("--batch_size", type=PositiveInt | None, default=None, help="Rows, over the config's.")
        parser.add_argument("--length", type=PositiveInt | None, default=None, help="Tokens, over data.max_length.")
        parser.add_argument(
            "--precisions",
            type=list[Literal["float32", "bf16-mixed", "16-mixed", "bf16-base", "nf4-base"]] | None,
            default=None,
            help="Overlays to set side by side; all by default, and the config's own in any case.",
        )
        parser.add_argument(
            "--processes", type=PositiveInt | None, default=None, help="Of DDP and FSDP2; trainer.devices, or 2."
        )
        parser.add_argument(
            "--json",
            type=str | None,
            default=None,
            nargs="?",
            const="-",
            help="Print the plan as JSON and nothing else; with a name, write it to that file.",
        )

    def link_data(self, parser: LightningArgumentParser) -> None:
        """What the data would hand down, from their section of the config."""
        parser.add_argument(
            "--num_labels", type=PositiveInt | None, default=None, help="Labels, where the config names none."
        )
        given = ("data", "num_labels")
        for part in ("task", "backbone"):
            place = f"model.{part}.init_args"
            parser.link_arguments(given, f"{place}.num_classes", compute_fn=lambda d, n: count_in(d, n, self.notes))
            parser.link_arguments(given, f"{place}.label_names", compute_fn=lambda d, n: labels_in(d, n, self.notes))
        parser.link_arguments("data", "model.backbone.init_args.pad_token_id", compute_fn=lambda _: 0)
        parser.link_arguments("data", "model.task.init_args.tokenizer", compute_fn=lambda _: _no_tokenizer())

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As given; there is no run whose config could be meant."""
        if isinstance(args, list):
            GIVEN.set(["plan", *args])
            check(args)
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """The module alone, on the meta device."""
        self.base = resident()
        config = self.config.clone()
        config.data = None
        for name in UNUSED:
            config.trainer[name] = None
        with torch.device("meta"):
            module = self._built(config)
        task = module.task
        size = size_in(
            self.config.data,
            task,
            module.backbone,
            self.notes,
            batch_size=self.config.batch_size,
            length=self.config.length,
        )
        self.plan = planned(module, size, self._wanted(module), self.notes.lines)

    def _built(self, config: Any) -> LoRAModule:
        try:
            return self.parser.instantiate_classes(config).model  # type: ignore[no-any-return]
        except NotImplementedError as error:
            reason = str(error).strip().partition("\n")[0]
            raise LoRAError(f"the backbone cannot be built on the meta device: {reason}") from error

    def _wanted(self, module: LoRAModule) -> Wanted:
        trainer = self.config.trainer
        asked, accelerator = trainer.precision, str(trainer.accelerator)
        precision = asked if asked in PRECISIONS else str(lightnings_own(asked, accelerator) or "32-true")
        known = {"32-true": "float32", "32": "float32", "16": "16-mixed", "bf16": "bf16-mixed"}
        precision = known.get(str(precision), str(precision))
        if precision not in PRECISIONS:
            raise LoRAError(f"plan knows the precisions {', '.join(PRECISIONS)}, got {precision}")
        on_gpu = accelerator not in ("cpu",) and torch.cuda.is_available()
        shown = tuple(
            p for p in PRECISIONS if self.config.precisions is None or p in (*self.config.precisions, precision)
        )
        return Wanted(
            base=None if on_gpu else self.base,
            precisions=shown,
            way=Way(precision=precision, checkpointing=module.training_forward.recomputation is not None),
            strategy=_strategy(trainer.strategy),
            processes=self.config.processes or _processes(trainer),
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


def main(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        LoRAError: a config that cannot be planned, in one line.
    """
    with redirect_stdout(sys.stderr):  # what libraries say goes beside the plan
        cli = PlanCLI(list(args))
    told = json.dumps(cli.plan.to_dict(), indent=2)
    if cli.config.json == "-":
        print(told)
        return
    show(cli.plan, Console())
    if cli.config.json:
        Path(cli.config.json).write_text(told + "\n")
