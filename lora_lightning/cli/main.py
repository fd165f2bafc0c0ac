"""`lora-lightning`: LightningCLI with `export`, run folders, checkpoints by name, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger

from lora_lightning.cli.config_files import check
from lora_lightning.cli.config_overrides import set_precision
from lora_lightning.cli.diagnostics import refuse_config
from lora_lightning.cli.exit_codes import chain, is_raised_by_user
from lora_lightning.cli.parser import OneLine
from lora_lightning.cli.trained_run import resolve_checkpoint, use_run_data, with_run_config
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.callbacks.guards import FreezeBase, StopOnNonFinite
from lora_lightning.training.callbacks.prediction_writer import PredictionWriter
from lora_lightning.training.callbacks.run_report import RunReport
from lora_lightning.training.callbacks.steps import Progress, StepFigures, Throughput
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.checkpoints.adapter_state import RESUME_KEY
from lora_lightning.training.checkpoints.model_checkpoint import Checkpoints
from lora_lightning.training.checkpoints.resume import Resume, next_log_step
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.preflight import refuse_contradictions, refuse_unsupported_name
from lora_lightning.training.tracking.loggers import ContinuedCSVLogger, RepeatedCSVLogger, go_on_with
from lora_lightning.training.tracking.wandb_callback import Tracking, go_on_with_run_of, log_config
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
        edit: changes a copy of the command's config in place, of which everything is built.
    """

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
        self.words = list(map(str, words)) if isinstance(words, list) else []
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

    # ---- the parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return Lightning's subcommands and `export`, or only the one that runs: each parser takes 0.3 s."""
        known = {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}
        return {name: known[name] for name in self.words[:1] if name in known} or known

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser for the command or for one subcommand."""
        kwargs.pop("dump_header", None)
        parser = Parser(**kwargs, words=self.words)
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
        for target, source in LINKS.items():
            parser.link_arguments(source, target, apply_on="instantiate")
        # Left out, alpha is 2 r whatever r a flag gives; LoRAConfig's default instance has worked it out for r=8.
        parser.set_defaults({"model.lora.alpha": None})
        # The injection table says what trains; Lightning's own summary would say it again, in one row.
        parser.set_defaults({"trainer.enable_model_summary": False})

    # ---- the config

    @property
    def command(self) -> Namespace:
        """The command's config, as the user gave it."""
        return self.config[str(self.config.subcommand)]  # type: ignore[no-any-return]

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; without --config, a command on a trained run takes the config that the run was made with."""
        if self.until == "parser":
            self.config = Namespace(subcommand=None, seed_everything=False)  # type: ignore[no-untyped-call]
            return
        words = with_run_config(self.words)
        check(words)
        self.config = parser.parse_object(args) if isinstance(args, dict | Namespace) else parser.parse_args(words)
        name = self.config.get("subcommand")
        if name is None:
            return
        refuse_config(self.command, words)
        refuse_unsupported_name(getattr(self.command.get("trainer.strategy"), "class_path", None))
        if name != "export" and self.command.get("data") is None:
            raise LoRAError(f"{name} needs a data section in its config: data: {{class_path: ..., init_args: ...}}")
        resolve_checkpoint(self.command, name)
        self._named_data = use_run_data(self.command, name, words)

    def _parse_ckpt_path(self) -> None:
        """Read nothing: Lightning would open an unchecked file for hyperparameters, which ours does not have."""

    # ---- the objects

    def instantiate_classes(self) -> None:
        """Make the objects; an error of a class is raised without jsonargparse's list of the types that it tried.

        Raises:
            LoRAError: an object of this package refuses its arguments.
            ValueError: an object of the user's does.
        """
        if self.until == "parser":
            return
        config, name = self.config.clone(), str(self.subcommand)
        if self.edit is not None:
            self.edit(config[name])
        try:
            set_precision(config[name])
            self.config_init = self.parser.instantiate(config)
        except ValueError as error:
            for cause in chain(error):
                if isinstance(cause, LoRAError) or is_raised_by_user(cause):
                    raise cause from None
            raise
        made = self.config_init[name]
        self.datamodule, self.model = made.get("data"), made.model
        self.trainer = None if self.until == "module" else self.instantiate_trainer()  # type: ignore[assignment]

    def after_instantiate_classes(self) -> None:
        """Run nothing where `until` says so."""
        if self.until != "end":
            self.subcommand = None

    def before_fit(self) -> None:
        """Refuse what would end a running fit, before there is a run folder."""
        refuse_contradictions(self.command, self.trainer, self.model, self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks that are on by default, and a log in the run folder."""
        config = self.config_init[str(self.subcommand)].trainer
        callbacks = _as_list(config.get("callbacks"))

        def lacks(kind: type[Callback]) -> bool:
            return not any(isinstance(callback, kind) for callback in callbacks)

        first = [Throughput, StepFigures, StopOnNonFinite, Resume, PredictionWriter, FreezeBase]
        last: list[type[Callback]] = [RunReport, Tracking]  # a table closes a fit, after the others have added to it
        callbacks = [*(kind() for kind in first if lacks(kind)), *callbacks, *(kind() for kind in last if lacks(kind))]
        if config.get("enable_progress_bar") is not False and lacks(ProgressBar):
            callbacks.append(Progress())
        if config.get("enable_checkpointing") is not False and lacks(ModelCheckpoint):
            callbacks.append(Checkpoints(save_every=self.command.save_every))
        if config.get("logger") is False and not config.get("default_root_dir"):
            kwargs["default_root_dir"] = str(Path(self.command.runs_dir) / self.command.name)
        if self.subcommand == "export":
            kwargs |= single_process_options(config.get("accelerator"))
        return super().instantiate_trainer(callbacks=callbacks, logger=self._loggers(config.get("logger")), **kwargs)

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        """Return a CSV log, which sets the run's folder, and the loggers of the config."""
        if configured is False:
            return False
        loggers, command, fits = _as_list(configured), self.command, self.subcommand == "fit"
        checkpoint = command.get("ckpt_path")
        if fits and checkpoint:
            resume_loggers(loggers, checkpoint)
        if any(isinstance(logger, CSVLogger) for logger in loggers):
            return sorted(loggers, key=lambda logger: not isinstance(logger, CSVLogger))
        if fits and checkpoint and "://" not in checkpoint:
            version = run.continued_version(Path(checkpoint), Path(command.runs_dir) / command.name)
            if version is not None:
                return [ContinuedCSVLogger(command.runs_dir, name=command.name, version=version), *loggers]
        if fits or not checkpoint:
            return [CSVLogger(command.runs_dir, name=command.name), *loggers]
        folder, stage = run.run_of_checkpoint(Path(checkpoint)), str(self.subcommand)
        if self._named_data is None or stage == "predict":
            go_on_with_run_of(loggers, checkpoint)
        else:  # the figures of the run's own data stay
            stage = f"{stage}_{self._named_data}"
        return [RepeatedCSVLogger(folder, name="", version=stage), *loggers]


def _as_list(value: Any) -> list[Any]:
    """Return the members of an option that takes one, several, or none."""
    if value is None or value is True:
        return []
    return list(value) if isinstance(value, list) else [value]


def resume_loggers(loggers: list[Any], checkpoint: str) -> None:
    """Let loggers continue the runs of the checkpoint, where it is the newest state of its run."""
    if not loggers or "://" in checkpoint or not run.is_newest_state(Path(checkpoint)):
        return
    content = run.load_checkpoint(checkpoint)
    if RESUME_KEY in content:
        stepped = content["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        go_on_with(loggers, content[RESUME_KEY].get("loggers", []), next_log_step(content[RESUME_KEY], stepped))
