"""`--help`: a screen that a person reads, and with a word after it all that is told of one group or of everything."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from typing import Any

from lora_lightning.cli.help_all import has_groups, usage
from lora_lightning.cli.registry import ENTRIES, FROM_CHECKPOINT
from lora_lightning.lora.errors import did_you_mean

TRAINER = {
    "max_epochs": "epochs to train",
    "max_steps": "optimizer steps to train; -1: the epochs' own",
    "max_time": "stop after this time, as DD:HH:MM:SS",
    "accelerator": "cpu, gpu, mps, tpu, ... or auto",
    "devices": "how many, [their numbers], -1 for all, or auto",
    "num_nodes": "machines",
    "strategy": "auto, ddp, fsdp2; configs/strategy/ has overlays",
    "precision": "float32, bf16-base, nf4-base, bf16-mixed, auto, ...",
    "accumulate_grad_batches": "batches to a step",
    "gradient_clip_val": "largest norm of the gradients",
    "val_check_interval": "epoch's share or batches between validations",
    "check_val_every_n_epoch": "epochs between them",
    "limit_train_batches": "share or number of batches to train on",
    "log_every_n_steps": "steps between two lines of metrics.csv",
    "fast_dev_run": "one batch of each set, leaving no run",
    "callbacks": "list of {class_path, init_args}",
    "logger": "list of classes beside metrics.csv; false: none",
    "enable_progress_bar": "the bar on the screen",
}
"""Of the Trainer's options those that most runs set, each in a line."""

TO_TRAIN = (
    *("max_epochs", "max_steps", "max_time", "accumulate_grad_batches", "gradient_clip_val", "val_check_interval"),
    *("check_val_every_n_epoch", "limit_train_batches", "log_every_n_steps"),
)
"""Those of them that say nothing where nothing trains."""

RUN = {
    "config": "a YAML file; of several a later one wins",
    "print_config": "print the whole config as a file, and end",
    "seed_everything": "seed of everything that is drawn",
    "ckpt_path": "where to go on or what to use: last, best, a run folder, a .ckpt file",
    "weights_only": "false: a checkpoint may hold objects too",
    "verbose": "print the metrics",
    "return_predictions": "keep predictions in memory too",
}
"""What Lightning tells at length."""

COLUMN = 31
"""Where what is told of an option begins, behind all but the longest."""
FIT_PATH = "go on from auto (the newest), last, best, a run or .ckpt"
GROUPS = ("run", "model", "lora", "data", "trainer")


class ShowHelp(argparse._HelpAction):
    """`--help`, `--help all` and `--help GROUP`."""

    def __init__(self, option_strings: list[str], dest: str = SUPPRESS, default: str = SUPPRESS, **_: Any) -> None:
        super().__init__(option_strings, dest, default, help="this screen")
        self.nargs, self.metavar = "?", "all"

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(screen(parser, values))
        parser.exit()


def screen(parser: Any, word: str | None = None) -> str:
    """What `--help` shows: the short screen, everything, or one group."""
    everything = str(parser.format_help())
    if word is None:
        return short(parser, everything)
    if word == "all":
        return everything
    if word not in GROUPS or not has_groups(parser):
        words = ["all", *(GROUPS if has_groups(parser) else ())]
        return f"--help {word}: no such group{did_you_mean(word, words)} ({', '.join(words)})"
    kept = [part for part in everything.split("\n\n") if _group_of(_first_flag(part)) == word]
    return "\n\n".join(kept)


def _first_flag(section: str) -> str:
    found = re.search(r"^ +(?:-\w \w+, )?--([\w.]+)", section, re.M)
    return found[1] if found and "-->" not in section else "-"


def _group_of(key: str) -> str:
    if key.startswith("model.lora"):
        return "lora"
    first = key.partition(".")[0]
    return first if first in GROUPS else "" if key == "-" else "run"


# ---- the short screen


def short(parser: Any, everything: str) -> str:
    """A line for each option that most runs set, in groups; of a small command everything."""
    if not has_groups(parser):
        return everything
    command = parser.prog.rpartition(" ")[2]
    lines = [usage(parser), "", *_head(command), ""]
    titles = {
        "run": "the run",
        "model": "model: what is trained, and how",
        "lora": "model.lora: what is adapted",
        "data": "data: where the rows are",
        "trainer": "trainer: Lightning's own",
    }
    for group in GROUPS:
        own = [
            action for action in _actions(parser) if _group_of(action.dest) == group and not _hidden(action, command)
        ]
        rows = [_row(action, command) for action in own]
        hidden = sum(1 for action in _actions(parser) if _hidden(action, command))
        lines += [titles[group], *rows]
        if group == "trainer" and hidden:
            lines.append(f"  and {hidden} more: lora-lightning {command} --help trainer")
        lines.append("")
    return "\n".join(lines).rstrip()


def _head(command: str) -> list[str]:
    """What the command is for, and where the rest is told."""
    example = "For example: fit -c configs/demo.yaml"
    if command in FROM_CHECKPOINT:
        example = f"For example: {command} --ckpt_path runs/demo"
    line = ENTRIES[command].line if command in ENTRIES else ""
    return [
        f"{line[:1].upper()}{line[1:]}.",
        example,
        "",
        f"  {command} --help all        every option with all that is told of it, or of a group:",
        f"  {command} --help trainer    run, model, lora, data or trainer",
        f"  {command} --data.help CLASS the arguments of a class; so do --model.task.help,",
        "        --model.backbone.help, --model.optimizer.help, --trainer.callbacks.help ...",
    ]


def _actions(parser: Any) -> Iterator[Action]:
    """Options that hold a value; those that jsonargparse adds to them are told of at the top."""
    for action in parser._actions:
        whole_group = type(action).__name__ == "_ActionConfigLoad"
        if action.option_strings and action.help != SUPPRESS and not action.dest.endswith(".help") and not whole_group:
            yield action


def _hidden(action: Action, command: str) -> bool:
    """Whether it is left to `--help trainer`: most runs leave it alone, or the command does not train."""
    group, _, name = action.dest.partition(".")
    return group == "trainer" and (name not in TRAINER or (command != "fit" and name in TO_TRAIN))


def _row(action: Action, command: str) -> str:
    name = action.dest.removeprefix("trainer.")
    told = TRAINER[name] if action.dest.startswith("trainer.") else RUN.get(name) or sentence(action.help or "")
    if name == "ckpt_path" and command == "fit":
        told = FIT_PATH
    if action.dest in ("data", "model.task"):
        told = f"class_path and init_args: {', '.join(classes_of(action.dest))}, or your own"
    flags = ", ".join(str(option) for option in action.option_strings if not option.endswith("+"))
    end = _default(action)
    few: dict[str, Any] = {} if action.dest in ("data", "model.task") else {"max_lines": 2, "placeholder": f" ...{end}"}
    return textwrap.fill(
        told + end,
        _width(),
        initial_indent=f"  {flags:<{COLUMN - 3}} ",
        subsequent_indent=" " * COLUMN,
        break_on_hyphens=False,
        break_long_words=False,
        **few,
    )


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, 72), 120)


def sentence(text: str) -> str:
    """The first of a docstring, without the markup."""
    text = re.sub(r" \([^()]*arXiv[^()]*\)", "", " ".join(text.split()))
    first = re.split(r"(?<=[a-z0-9)`])[.;:](?:\s|$)", text, maxsplit=1)[0]
    return first.replace("``", "").replace("`", "")


def _default(action: Action) -> str:
    value = action.default
    if isinstance(value, dict) and "class_path" in value:
        value = str(value["class_path"]).rpartition(".")[2]
    if value in (None, SUPPRESS, "", [], {}) or not isinstance(value, str | int | float | list):
        return ""
    return f" ({str(value).lower() if isinstance(value, bool) else value})"


def classes_of(key: str) -> list[str]:
    """Our own for `data` or `model.task`, by name, but for what users subclass."""
    import lora_lightning

    where, ending = ("lora_lightning.data.", "Data") if key == "data" else ("lora_lightning.tasks.", "")
    return sorted(
        name
        for name, module in lora_lightning._WHERE.items()
        if module.startswith(where) and name.endswith(ending) and name not in ("TableData", "Task", "StepOutput")
    )
