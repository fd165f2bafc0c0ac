"""`lora-lightning`: LightningCLI with `export`, run folders, checkpoints by name, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger

from lora_lightning.cli.config_files import check
from lora_lightning.cli.config_overrides import (
    labels_of_run,
    precision_for_backbone,
    refuse_other_split,
    rows_by_flag,
    with_run_config,
)
from lora_lightning.cli.diagnostics import refuse_config
from lora_lightning.cli.exit_codes import is_raised_by_user
from lora_lightning.cli.parser import CommandLine, OneLine
from lora_lightning.cli.registry import FROM_CHECKPOINT
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.callbacks.freeze_base import FreezeBase
from lora_lightning.training.callbacks.gradient_norms import StepFigures
from lora_lightning.training.callbacks.nan_guard import StopOnNonFinite
from lora_lightning.training.callbacks.prediction_writer import PredictionWriter
from lora_lightning.training.callbacks.progress_bar import Progress
from lora_lightning.training.callbacks.run_report import RunReport
from lora_lightning.training.callbacks.throughput import Throughput
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.checkpoints.adapter_state import RESUME_KEY
from lora_lightning.training.checkpoints.model_checkpoint import Checkpoints
from lora_lightning.training.checkpoints.resume import Resume, next_log_step
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.preflight import (
    refuse_other_count,
    refuse_other_size,
    refuse_unlogged,
    refuse_unsupported_name,
)
from lora_lightning.training.tracking.csv_logger import ContinuedCSVLogger, RepeatedCSVLogger
from lora_lightning.training.tracking.wandb_callback import Tracking, go_on_with_run_of, log_config
from lora_lightning.training.tracking.wandb_logger import go_on_with
from lora_lightning.training.trainer import LoRATrainer, single_process_options

LINKS = {
    "model.task.init_args.num_classes": "data.num_classes",
    "model.backbone.init_args.num_classes": "data.num_classes",
    "model.backbone.init_args.pad_token_id": "data.pad_token_id",
    "model.backbone.init_args.label_names": "data.label_names",
    "model.backbone.init_args.tokenizer": "data.tokenizer",
    "model.task.init_args.label_names": "data.label_names",
    "model.task.init_args.tokenizer": "data.tokenizer",
}
"""Arguments of the model that the data set, where the DataModule has the attribute; else the config's value holds."""

# The docstring under each field of LoRAConfig and SplitConfig is its --help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Parser(OneLine, LightningArgumentParser):
    """LightningCLI's parser, which answers mistakes in one line."""

    def add_function_arguments(
        self, function: Callable[..., Any], *args: Any, linked_targets: set[str] | None = None, **kwargs: Any
    ) -> list[str]:
        """Drop the names of links, which jsonargparse hands to classes only: a backbone may be made by a function."""
        return super().add_function_arguments(function, *args, **kwargs)  # type: ignore[no-any-return]


class SaveRunConfig(SaveConfigCallback):
    """Writes each fit's `config.yaml` into its run folder; other commands leave it alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: Lightning would, before a checkpoint that does not fit is refused."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the config. A resumed fit writes over the run's file, so not before its checkpoint was accepted."""
        folder = run.run_dir(trainer)
        if folder is None or self.already_saved:
            return
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            shared = self.config.clone()
            for name in ("ckpt_path", "weights_only"):  # arguments of fit; without them the file serves every command
                shared.pop(name, None)
            read_off_train = getattr(trainer.datamodule, "read_off_train", dict)  # type: ignore[attr-defined]
            for name, value in read_off_train().items():
                shared.data.init_args[name] = value
            for target in LINKS:  # a value that the config gave is kept: the data may have none
                if shared.get(target) is None:
                    shared.pop(target, None)
            # In one file: for several jsonargparse would enter the folder, where a logger's thread may be writing.
            text = self.parser.dump(shared, skip_unset=False, skip_validation=True, skip_link_targets=False)
            (folder / run.CONFIG).write_text(text, encoding="utf-8")
            log_config(trainer.loggers, folder / run.CONFIG)
        self.already_saved = True


Stage = Literal["parser", "module", "trainer", "end"]
"""How far a command goes: its parser, the data and the module, the Trainer over them, or its end."""


class LoRACLI(LightningCLI):
    """LightningCLI over `LoRAModule`, `LoRATrainer` and any DataModule.

    Args:
        args: the words of the command line, those of the process by default; or a config as a dict.
        until: where to stop, for code that reads a run without starting it: see `cli.build`.
        edit: changes the command's config in place before anything is built.
    """

    _goes_on: int | None = None
    """The version of the run that a fit continues; None where it makes a new one."""

    _named_data: str | None = None
    """The short name of data that a flag sets, where a trained run is tested or predicts on other data."""

    def __init__(
        self,
        args: ArgsType = None,
        *,
        until: Stage = "end",
        edit: Callable[[Namespace], None] | None = None,
        **kwargs: Any,
    ) -> None:
        words = sys.argv[1:] if args is None else args
        self.until, self.edit = until, edit
        self.line = CommandLine(list(map(str, words)) if isinstance(words, list) else [])
        super().__init__(
            model_class=LoRAModule,
            datamodule_class=None,  # any, and none where a command can do without
            trainer_class=LoRATrainer,
            save_config_callback=SaveRunConfig,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": "lora-lightning",
                "description": "LoRA fine-tuning on PyTorch Lightning. First: fit --config FILE.",
            },
            args=args,
            **kwargs,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return Lightning's subcommands and `export`, or only the one that runs: each parser takes 0.3 s."""
        known = {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}
        command = self.line.words[0] if self.line.words else ""
        return {command: known[command]} if command in known else known

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser for the command or for one subcommand."""
        kwargs.pop("dump_header", None)
        parser = Parser(**kwargs, line=self.line)
        parser.add_argument("-c", "--config", action="config", help="A YAML file; given again, the later one wins.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name and folders, and the links from the data to the model."""
        parser.add_argument("--name", type=str, default="lora", help="Name of the run: it goes to runs_dir/name/.")
        parser.add_argument("--runs_dir", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--save_every",
            type=PositiveInt | None,
            default=None,
            help="Optimizer steps between two last.ckpt; by default an epoch's.",
        )
        self.link_data(parser)
        # Left out, alpha is 2 r whatever r a flag gives; LoRAConfig's default instance has worked it out for r=8.
        parser.set_defaults({"model.lora.alpha": None})
        # The injection table says what trains; Lightning's own summary would say it again, in one row.
        parser.set_defaults({"trainer.enable_model_summary": False})

    def link_data(self, parser: LightningArgumentParser) -> None:
        """Link labels, padding and tokenizer of the data to the backbone and the task."""
        for target, source in LINKS.items():
            parser.link_arguments(source, target, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; without --config, a command on a trained run takes the config that the run was made with."""
        if self.until == "parser":
            self.config = Namespace(subcommand=None, seed_everything=False)  # type: ignore[no-untyped-call]
            return
        words = self.line.words
        self.line.words = full = with_run_config(words)
        check(full)
        super().parse_arguments(parser, full if words and (args is not None or full != words) else args)
        name = self.config.get("subcommand")
        if name is None:
            return
        config = self.config[name]
        refuse_config(config, full)
        refuse_unsupported_name(getattr(config.get("trainer.strategy"), "class_path", None))
        if name != "export" and config.get("data") is None:
            raise LoRAError(f"{name} needs a data section in its config: data: {{class_path: ..., init_args: ...}}")
        if words and self.until != "module":
            self._resolve_checkpoint(config)
            refuse_other_split(config)
            if name != "fit":
                self._named_data = rows_by_flag(config, name, full)
                labels_of_run(config)

    def _resolve_checkpoint(self, config: Any) -> None:
        """Turn `best`, `last`, `auto` or a folder into a file before Lightning sees it."""
        path, command = config.get("ckpt_path"), str(self.config.subcommand)
        if path is None:
            if command in FROM_CHECKPOINT:
                raise LoRAError(f"{command} needs --ckpt_path: best, last, a run folder or a .ckpt file")
            return
        runs = Path(config.runs_dir) / config.name
        if path == "auto":
            if command != "fit":
                raise LoRAError(f"--ckpt_path auto is for fit, which starts anew where there is none; {command}: best")
            newest = run.newest_checkpoint(runs)
            config.ckpt_path = None if newest is None else str(newest)
        elif path == "last" and command == "fit" and run.newest_checkpoint(runs) is None:
            raise LoRAError(
                f"there is no checkpoint under '{runs}' to go on from: leave --ckpt_path out, or say --ckpt_path auto,"
                " which starts anew where there is none"
            )
        elif path in ("best", "last") and not runs.is_dir():
            raise LoRAError(
                f"no run under '{runs}' yet{run.similar_names(runs)}: fit first, or name a run with --ckpt_path"
            )
        elif path in ("best", "last"):
            config.ckpt_path = str(run.find_checkpoint(runs, path))
        elif "://" not in str(path) and path not in ("hpc", "registry"):
            config.ckpt_path = str(run.find_checkpoint(path, "last" if command == "fit" else "best"))
        if command == "fit" and config.ckpt_path and "://" not in str(config.ckpt_path):
            self._goes_on = run.continued_version(Path(config.ckpt_path), runs)

    def _parse_ckpt_path(self) -> None:
        """Read nothing: Lightning would open an unchecked file for hyperparameters, which ours does not have."""

    def instantiate_classes(self) -> None:
        """Make the objects; an error of a class is raised without jsonargparse's list of the types that it tried.

        Raises:
            LoRAError: an object of this package refuses its arguments.
            ValueError: an object of the user's does.
        """
        if self.until == "parser":
            return
        self.command = self.config[str(self.subcommand)]
        if self.edit is not None:
            self.command = self.command.clone()
            self.edit(self.config[str(self.subcommand)])
        try:
            with precision_for_backbone(self.config[str(self.subcommand)]):
                super().instantiate_classes()
        except ValueError as error:
            causes: list[BaseException] = [error]
            while before := causes[-1].__cause__ or causes[-1].__context__:
                causes.append(before)
            known = [cause for cause in causes if isinstance(cause, LoRAError) or is_raised_by_user(cause)]
            if not known:
                raise
            raise known[0] from None

    def before_fit(self) -> None:
        """Refuse what would end a running fit, before there is a run folder."""
        config = self.config[str(self.subcommand)]
        refuse_other_count(config, self.datamodule)
        refuse_other_size(self.model.backbone, self.model.task, self.datamodule)
        refuse_unlogged(self.trainer, self.model, config.get("model.lr_scheduler.init_args"))

    def after_instantiate_classes(self) -> None:
        """Run nothing where `until` says so."""
        if self.until != "end":
            self.subcommand = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks that are on by default, and a log in the run folder."""
        if self.until == "module":
            return None  # type: ignore[return-value]
        config = self.config_init[str(self.subcommand)].trainer
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        for default in (FreezeBase, PredictionWriter, Resume, StopOnNonFinite, StepFigures, Throughput):
            if not any(isinstance(callback, default) for callback in callbacks):
                callbacks.insert(0, default())
        if not any(isinstance(callback, RunReport) for callback in callbacks):
            callbacks.append(RunReport())  # its table closes a fit, after the other callbacks have added to it
        if not any(isinstance(callback, Tracking) for callback in callbacks):
            callbacks.append(Tracking())
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(Progress())
        if config.get("enable_checkpointing") is not False and not any(
            isinstance(callback, ModelCheckpoint) for callback in callbacks
        ):
            callbacks.append(Checkpoints(save_every=self.config[self.config.subcommand].save_every))
        if config.get("logger") is False and not config.get("default_root_dir"):
            command = self.config[self.config.subcommand]
            kwargs["default_root_dir"] = str(Path(command.runs_dir) / command.name)
        if self.config.subcommand == "export":
            kwargs |= single_process_options(config.get("accelerator"))
        return super().instantiate_trainer(callbacks=callbacks, logger=self._loggers(config.get("logger")), **kwargs)

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        """Return a CSV log, which sets the run's folder, and the loggers of the config."""
        if configured is False:
            return False
        if self.config.subcommand == "fit" and self.config.fit.ckpt_path:
            resume_loggers(None if configured in (None, True) else configured, self.config.fit.ckpt_path)
        loggers = (
            [] if configured in (None, True) else list(configured) if isinstance(configured, list) else [configured]
        )
        if any(isinstance(logger, CSVLogger) for logger in loggers):
            return sorted(loggers, key=lambda logger: not isinstance(logger, CSVLogger))
        command = self.config[self.config.subcommand]
        if self._goes_on is not None:
            return [ContinuedCSVLogger(command.runs_dir, name=command.name, version=self._goes_on), *loggers]
        if self.config.subcommand != "fit" and command.get("ckpt_path"):
            version, folder = str(self.config.subcommand), run.run_of_checkpoint(Path(command.ckpt_path))
            if self._named_data is None or version == "predict":
                go_on_with_run_of(loggers, command.ckpt_path)
            else:  # the figures of the run's own data stay
                version = f"{version}_{self._named_data}"
            return [RepeatedCSVLogger(folder, name="", version=version), *loggers]
        return [CSVLogger(command.runs_dir, name=command.name), *loggers]


def resume_loggers(loggers: Any, checkpoint: str) -> None:
    """Let loggers continue the runs of the checkpoint, where it is the newest state of its run."""
    if not loggers or "://" in checkpoint or not run.is_newest_state(Path(checkpoint)):
        return
    content = run.load_checkpoint(checkpoint)
    if RESUME_KEY in content:
        stepped = content["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        loggers = loggers if isinstance(loggers, list) else [loggers]
        go_on_with(loggers, content[RESUME_KEY].get("loggers", []), next_log_step(content[RESUME_KEY], stepped))
