"""`lora-lightning`: LightningCLI with `export`, run folders, checkpoints by name, and errors in one line."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger

from lora_lightning.class_paths import explained
from lora_lightning.commands import COMMANDS, POSITIONAL
from lora_lightning.data.base import TableData
from lora_lightning.handed_down import handed_down
from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.training import run
from lora_lightning.training.callbacks import (
    Checkpoints,
    FreezeBase,
    PredictionWriter,
    Progress,
    Resume,
    RunReport,
    StepFigures,
    StopOnNonFinite,
    Throughput,
    Tracking,
)
from lora_lightning.training.callbacks.resume import KEY, next_logged
from lora_lightning.training.loggers import ContinuedCSVLogger, RepeatedCSVLogger, go_on_with
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.trainer import LoRATrainer, in_one_process
from lora_lightning.training.wandb_run import go_on_with_run_of, log_config

# The docstring under each field of LoRAConfig and SplitConfig is its --help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

FROM_CHECKPOINT = ("validate", "test", "predict", "export")
"""Commands that work on a trained run, and need no --config where --ckpt_path leads to one."""

PLAN = "What a config will train and cost, without its weights or data; takes the flags of fit."

KNOWN = re.compile(r",\s+known\s+subclasses:[^()]*(?=\)\n)")


def _shorter(listed: re.Match[str]) -> str:
    """A list of known subclasses that a person can take in, or nothing."""
    return listed.group() if listed.group().count(",") <= 30 else ""


def _own_first(sections: str) -> str:
    """A command's own options in front of those that it shares with all others, which fill ten screens."""
    parts = sections.split("\n\n")
    starts = [part.partition("\n")[0] for part in parts]
    if "Linked arguments:" in starts[:-1] and "options:" in starts:
        _, _, own = parts.pop().partition("\n")
        parts.insert(starts.index("options:"), f"options of this command:\n{own.rstrip()}")
    return "\n\n".join(parts).rstrip() + "\n"


UNION = re.compile(r"(Parser key \"[^\"]*\": ).*?Subtypes: \[(.*)\] Errors: .*Given value: (.*)")
LITERAL = re.compile(r"(Parser key \"[^\"]*\": )Expected a (?:typing\.)?Literal\[(.*)\]\. Got value: (.*)")


def _plainly(text: str) -> str:
    """A value that fits none of several types, said without the types' Python names."""
    found = UNION.fullmatch(text) or LITERAL.fullmatch(text)
    if found is None:
        return text
    key, types, given = found.groups()
    choices = list(dict.fromkeys(re.findall(r"'([^']+)'", re.sub(r"<class '\w+'>", "", types))))
    classes = [name.lower() for name in re.findall(r"<class '(?:\w+\.)*(\w+)'>", types) if name != "NoneType"]
    expected = f" expected {', '.join([*choices, *classes])}" if choices or classes else ""
    return f"{key}{expected.strip()}, got {given}{did_you_mean(given, choices)}"


class Parser(LightningArgumentParser):
    """Answers a mistake with one line instead of a screen of usage."""

    _linked_targets: set[str] | None = None

    def add_function_arguments(
        self, function: Callable[..., Any], *args: Any, linked_targets: set[str] | None = None, **kwargs: Any
    ) -> list[str]:
        """Let the data's label names flow into a backbone that a function makes; jsonargparse links classes only."""
        self._linked_targets = linked_targets
        try:
            return super().add_function_arguments(function, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            self._linked_targets = None

    def _add_signature_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        if self._linked_targets is not None:
            kwargs["linked_targets"] = self._linked_targets
        return super()._add_signature_arguments(*args, **kwargs)  # type: ignore[no-any-return,misc]

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Without a usage of a hundred flags and without the names of every nn.Module that is loaded."""
        usage, _, rest = str(super().format_help(*args, **kwargs)).partition("\n\n")
        if len(usage.splitlines()) > 5:
            prog = self.prog.replace(" [options]", "")
            wants = "--ckpt_path RUN [-c CONFIG ...]" if prog.endswith(FROM_CHECKPOINT) else "-c CONFIG [-c CONFIG ...]"
            if positional := POSITIONAL.get(prog.rpartition(" ")[2]):
                one = positional.upper().removesuffix("S")
                wants = f"{one} [{one} ...]"
            usage = f"usage: {prog} {wants} [options]"
        return f"{usage}\n\n{KNOWN.sub(_shorter, _own_first(rest))}"

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print the message, a near miss where there is one, and exit with 2."""
        told = " ".join(line.strip() for line in str(message).splitlines() if line.strip())
        text = explained(told, sys.argv[1:]) or _plainly(told)
        known = [option for action in self._actions for option in action.option_strings]
        wrong = next((arg.split("=")[0] for arg in sys.argv[1:] if arg.startswith("--") and arg in text), "")
        hint = did_you_mean(wrong, known) if wrong and wrong not in known else ""
        if "from_pretrained does not correspond" in text:
            hint = ": write class_path: lora_lightning.huggingface, and the class as init_args.auto_class"
        print(f"lora-lightning: error: {text}{hint} (see --help)", file=sys.stderr)
        sys.exit(2)


class SaveRunConfig(SaveConfigCallback):
    """Each fit's own `config.yaml` in its run folder; other commands leave it alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning writes here, where a checkpoint that does not fit has not been refused yet."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit that goes on writes over the run's file: only once it is one."""
        folder = run.run_dir(trainer)
        if folder is None or self.already_saved:
            return
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            shared = self.config.clone()
            for own in ("ckpt_path", "weights_only"):  # arguments of fit; without them the file serves every command
                shared.pop(own, None)
            if isinstance(trainer.datamodule, TableData):  # type: ignore[attr-defined]
                for name, value in trainer.datamodule.read_off_train().items():  # type: ignore[attr-defined]
                    shared.data.init_args[name] = value
            self.parser.save(shared, str(folder / run.CONFIG), skip_none=False, skip_validation=True, overwrite=True)
            log_config(trainer.loggers, folder / run.CONFIG)
        self.already_saved = True


class LoRACLI(LightningCLI):
    """LightningCLI over `LoRAModule`, `LoRATrainer` and any DataModule."""

    _goes_on: int | None = None
    """The version of the run that a fit goes on with; None where it makes one of its own."""

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        self._first = first_word(args)
        super().__init__(
            model_class=LoRAModule,
            datamodule_class=None,  # any, and none where a command can do without
            trainer_class=LoRATrainer,
            save_config_callback=SaveRunConfig,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            parser_kwargs={"description": "LoRA fine-tuning on PyTorch Lightning. First: fit --config FILE."},
            args=args,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own, and `export`."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Lightning's, and those that need no config, which `run_command` runs."""
        super()._add_subcommands(parser, **kwargs)
        subcommands = parser._subcommands_action
        assert subcommands is not None
        for name, function in COMMANDS.items():
            own = command_parser(name)
            subcommands.add_subcommand(name, own, help=_first_line(function))
        subcommands.add_subcommand("plan", self.init_parser(), help=PLAN)  # run by plan.py, with a parser of its own

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's, for the subcommand that is asked for: all five take 1.5 s more, to read the same docstrings."""
        wanted = self._first
        if wanted in (subcommand, None) or wanted not in (*self.subcommands(), *COMMANDS, "-h", "--help"):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)  # type: ignore[no-any-return]
        return self.init_parser(**kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser for the command or for one subcommand."""
        kwargs.pop("dump_header", None)
        kwargs["allow_abbrev"] = False  # `--model.lora.rank` must not be taken for rank_pattern
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="A YAML file; given again, the later one wins.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name the run, and let the data tell the model what it is about."""
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
        """Labels, padding and tokenizer from the data to the backbone and the task."""
        parser.link_arguments("data.num_classes", "model.task.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.backbone.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.pad_token_id", "model.backbone.init_args.pad_token_id", apply_on="instantiate")
        parser.link_arguments("data.label_names", "model.backbone.init_args.label_names", apply_on="instantiate")
        parser.link_arguments("data.label_names", "model.task.init_args.label_names", apply_on="instantiate")
        parser.link_arguments("data.tokenizer", "model.task.init_args.tokenizer", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Without --config, a command on a trained run takes the config that the run was made with."""
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list):
            full = with_run_config([str(arg) for arg in given])
            args = full if args is not None or full != given else None
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        if command not in (None, "export") and self.config[command].get("data") is None:
            raise LoRAError(f"{command} needs a data section in its config: data: {{class_path: ..., init_args: ...}}")
        if isinstance(given, list) and self.config.get("subcommand"):
            self._resolve_checkpoint(self.config[self.config.subcommand])

    def _resolve_checkpoint(self, config: Any) -> None:
        """`best`, `last`, `auto` or a folder to the file meant, before Lightning sees it."""
        path, command = config.get("ckpt_path"), str(self.config.subcommand)
        if path is None:
            if command in FROM_CHECKPOINT:
                raise LoRAError(f"{command} needs --ckpt_path: best, last, a run folder or a .ckpt file")
            return
        runs = Path(config.runs_dir) / config.name
        if path == "auto":
            if command != "fit":
                raise LoRAError(f"--ckpt_path auto is for fit, which starts anew where there is none; {command}: best")
            found = run.newest_checkpoint(runs)
            config.ckpt_path = None if found is None else str(found)
        elif path == "last" and command == "fit" and run.newest_checkpoint(runs) is None:
            raise LoRAError(
                f"there is no checkpoint under '{runs}' to go on from: leave --ckpt_path out, or say --ckpt_path auto,"
                " which starts anew where there is none"
            )
        elif path in ("best", "last"):
            config.ckpt_path = str(run.find_checkpoint(runs, path))
        elif "://" not in str(path) and path not in ("hpc", "registry"):
            config.ckpt_path = str(run.find_checkpoint(path, "last" if command == "fit" else "best"))
        if command == "fit" and config.ckpt_path and "://" not in str(config.ckpt_path):
            self._goes_on = run.continued(Path(config.ckpt_path), runs)

    def _parse_ckpt_path(self) -> None:
        """Lightning would read the file here, before it is known to be whole, for settings that win over flags.

        Ours holds none; what it was trained with is compared when it is loaded.
        """

    def instantiate_classes(self) -> None:
        """What a class of ours says of its arguments, without jsonargparse's account of the types that it tried.

        Raises:
            LoRAError: an object refuses its arguments.
        """
        try:
            with handed_down(self.config.get(str(self.subcommand), self.config)):
                super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, LoRAError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None

    def _dump_config(self) -> None:
        """A class without arguments has no `init_args`, where Lightning would note what is linked."""
        super()._dump_config()
        model = self.config_dump.get("model") or {}
        for part in ("backbone", "task"):
            if isinstance(model.get(part), dict):
                model[part].setdefault("init_args", {})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks that are on by default, and a log in the run folder."""
        config = self._get(self.config_init, "trainer")
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        for default in (FreezeBase, PredictionWriter, Resume, StopOnNonFinite, StepFigures, Throughput):
            if not any(isinstance(callback, default) for callback in callbacks):
                callbacks.insert(0, default())
        if not any(isinstance(callback, RunReport) for callback in callbacks):
            callbacks.append(RunReport())  # its table closes a fit, after whatever the others add to it
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
            kwargs |= in_one_process(config.get("accelerator"))
        return super().instantiate_trainer(callbacks=callbacks, logger=self._loggers(config.get("logger")), **kwargs)

    def _loggers(self, given: Any) -> list[Logger] | bool:
        """A CSV log in the run folder in front of what the config asks for; it also names the run's folder."""
        if given is False:
            return False
        if self.config.subcommand == "fit" and self.config.fit.ckpt_path:
            resume_loggers(None if given in (None, True) else given, self.config.fit.ckpt_path)
        loggers = [] if given in (None, True) else list(given) if isinstance(given, list) else [given]
        if any(isinstance(logger, CSVLogger) for logger in loggers):
            return sorted(loggers, key=lambda logger: not isinstance(logger, CSVLogger))
        command = self.config[self.config.subcommand]
        if self._goes_on is not None:
            return [ContinuedCSVLogger(command.runs_dir, name=command.name, version=self._goes_on), *loggers]
        if self.config.subcommand != "fit" and command.get("ckpt_path"):
            go_on_with_run_of(loggers, command.ckpt_path)
            folder = run.run_of_checkpoint(Path(command.ckpt_path))
            return [RepeatedCSVLogger(folder, name="", version=str(self.config.subcommand)), *loggers]
        return [CSVLogger(command.runs_dir, name=command.name), *loggers]


def resume_loggers(loggers: Any, checkpoint: str) -> None:
    """Let loggers go on with the runs that the checkpoint was written in, where it is the newest state of its run."""
    if not loggers or "://" in checkpoint or not run.is_newest_state(Path(checkpoint)):
        return
    content = run.load_checkpoint(checkpoint)
    if KEY in content:
        stepped = content["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        given = loggers if isinstance(loggers, list) else [loggers]
        go_on_with(given, content[KEY].get("loggers", []), next_logged(content[KEY], stepped))


def command_parser(name: str) -> Parser:
    """The parser of a command that needs no config."""
    function = COMMANDS[name]
    parser = Parser(prog=f"lora-lightning {name}", description=_first_line(function), allow_abbrev=False)
    positional = POSITIONAL.get(name)
    if positional is not None:
        parser.add_argument(positional, nargs="+", type=str, help="Adapters: directories, run folders or checkpoints.")
    parser.add_function_arguments(function, skip={positional} if positional else None)
    return parser


def run_command(name: str, args: list[str]) -> None:
    """Run a command that needs no config."""
    given = command_parser(name).parse_args(args)
    COMMANDS[name](**given.as_dict())


def first_word(args: ArgsType) -> str | None:
    """Of the command line; None where there is none, or where arguments are given as a dict."""
    given = sys.argv[1:] if args is None else args
    return str(given[0]) if isinstance(given, list) and given else None


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def with_run_config(args: list[str]) -> list[str]:
    """Put the run's own config in front where a command on a trained run names no other."""
    if not args or args[0] not in FROM_CHECKPOINT or any(a.split("=")[0] in ("-c", "--config") for a in args):
        return args
    given = next((a.partition("=")[2] for a in args if a.startswith("--ckpt_path=")), None)
    if "--ckpt_path" in args[:-1]:
        given = args[args.index("--ckpt_path") + 1]
    if given is None or given in ("best", "last"):
        return args
    file = run.run_of_checkpoint(run.find_checkpoint(given)) / run.CONFIG
    if not file.is_file():
        raise LoRAError(f"no {run.CONFIG} beside the checkpoint '{given}': name the run's config with --config")
    return [args[0], "--config", str(file), *args[1:]]
