"""The help texts: the first screen, `COMMAND --help`, and the long help of one group or of everything.

Nothing heavy is imported here, so that the first screen and a mistyped command are answered at once.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_lightning.cli.exit_codes import CODES
from lora_lightning.cli.registry import ENTRIES, FROM_CHECKPOINT
from lora_lightning.cli.registry import GROUPS as COMMAND_GROUPS
from lora_lightning.lora.errors import LoRAError, did_you_mean

ELSEWHERE = {
    **dict.fromkeys(("train", "finetune", "sft", "tune"), "fit"),
    **dict.fromkeys(("eval", "evaluate"), "test"),
    **dict.fromkeys(("generate", "infer", "inference"), "predict"),
}
"""Other tools' names of commands."""

GONE = {"completion": "bash completes commands and files by one line of ~/.bashrc, which docs/command.md has"}
"""Commands of earlier versions, and their replacements."""

EXAMPLES = """\
examples
  lora-lightning fit -c configs/demo.yaml --model.lora.r 16 --name wider
  lora-lightning test --ckpt_path runs/wider
  lora-lightning export --ckpt_path runs/wider --formats adapter"""

OPTIONS = """\
options
  -h, --help    this screen; lora-lightning COMMAND --help tells of a command
  --version     of this package
  --debug       with any command: show the traceback of what goes wrong (LORA_LIGHTNING_DEBUG=1 does the same)"""


def front_page() -> str:
    """Return the first screen: each command with a line, examples, and the meanings of exit codes."""
    parts = [
        "usage: lora-lightning COMMAND [options]",
        "LoRA fine-tuning on PyTorch Lightning: a YAML file describes a run.",
    ]
    for title, commands in COMMAND_GROUPS.items():
        parts.append("\n".join([title, *(f"  {name:<12}{command.line}" for name, command in commands.items())]))
    codes = [f"  {code:<5}{meaning}" for code, meaning in CODES.items()]
    return "\n\n".join([*parts, EXAMPLES, OPTIONS, "\n".join(["exit codes", *codes])])


def answer_without_command(args: list[str]) -> bool:
    """Answer arguments without a command, such as --version; return whether there were such.

    Raises:
        LoRAError: the first word is no command.
        SystemExit: with 2 where there are no arguments at all.
    """
    if not args:
        print(front_page(), file=sys.stderr)
        sys.exit(2)
    first = args[0]
    if first in ("-h", "--help", "help") and not args[1:]:
        print(front_page())
        return True
    if first in ("--version", "-V"):
        print(f"lora_lightning {version('lora_lightning')}")
        return True
    refuse_no_command(args)
    return False


def refuse_no_command(args: list[str]) -> None:
    """Raise for a first word that is no command."""
    first = args[0]
    if first in ENTRIES:
        return
    if first in GONE:
        raise LoRAError(f"'{first}' is no command any more: {GONE[first]}")
    named = next((arg for arg in args if arg in ENTRIES), None)
    if Path(first).suffix in (".yaml", ".yml"):
        raise LoRAError(f"a command comes first: lora-lightning {named or 'fit'} -c {first}")
    if first.startswith("-"):
        rest = " ".join(arg for arg in args if arg != named)
        raise LoRAError(f"a command comes first: lora-lightning {named or 'fit'} {rest}")
    meant = f": here it is '{ELSEWHERE[first]}'" if first in ELSEWHERE else did_you_mean(first, ENTRIES)
    raise LoRAError(f"no command '{first}'{meant} (there are {', '.join(ENTRIES)})")


def put_command_first(args: list[str]) -> list[str]:
    """Turn `help fit` and `--help fit` into `fit --help`."""
    if args[1:] and args[0] in ("-h", "--help", "help"):
        return [args[1], "--help", *args[2:]]
    return args


# ---- a command's screen

TRAINER = (
    *("max_epochs", "max_steps", "accelerator", "devices", "num_nodes", "strategy", "precision"),
    *("accumulate_grad_batches", "gradient_clip_val", "val_check_interval", "check_val_every_n_epoch"),
    *("limit_train_batches", "log_every_n_steps", "fast_dev_run", "callbacks", "logger"),
)
"""Options of the Trainer that most runs set."""

TO_TRAIN = (
    *("max_epochs", "max_steps", "max_time", "accumulate_grad_batches", "gradient_clip_val", "val_check_interval"),
    *("check_val_every_n_epoch", "limit_train_batches", "log_every_n_steps"),
)
"""Those of them that matter only in training."""

CHECKPOINT = {
    "fit": "go on from auto (the newest), last, best, a run folder or a .ckpt file",
    "other": "what to use: best, last, a run folder or a .ckpt file",
}
"""Texts in place of Lightning's, which does not know our words."""

COLUMN = 31
"""Column of the options' texts, after all but the longest names."""
GROUPS = ("run", "model", "lora", "data", "trainer")


class ShowHelp(argparse.Action):
    """Prints the screen of `--help`, `--help all` and `--help GROUP`."""

    def __init__(self, option_strings: list[str], dest: str = SUPPRESS, **_: Any) -> None:
        super().__init__(option_strings, SUPPRESS, nargs="?", default=SUPPRESS, metavar="all", help="this screen")

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(screen(parser, values))
        parser.exit()


def screen(parser: Any, word: str | None = None) -> str:
    """Return the screen of `--help`: the short one, everything, or one group."""
    everything = str(parser.format_help())
    if word == "all" or not (word or has_groups(parser)):
        return everything
    if word is None:
        return short_screen(parser)
    if word not in GROUPS or not has_groups(parser):
        words = ["all", *(GROUPS if has_groups(parser) else ())]
        return f"--help {word}: no such group{did_you_mean(word, words)} ({', '.join(words)})"
    return "\n\n".join(part for part in everything.split("\n\n") if _group_of(_first_flag(part)) == word)


def _first_flag(section: str) -> str:
    match = re.search(r"^ +(?:-\w \w+, )?--([\w.]+)", section, re.M)
    return match[1] if match and "-->" not in section else "-"


def _group_of(key: str) -> str:
    if key.startswith("model.lora"):
        return "lora"
    first = key.partition(".")[0]
    return first if first in GROUPS else "" if key == "-" else "run"


# ---- the short screen


TITLES = {
    "run": "the run",
    "model": "model: what is trained, and how",
    "lora": "model.lora: what is adapted",
    "data": "data: where the rows are",
    "trainer": "trainer: Lightning's own",
}


def short_screen(parser: Any) -> str:
    """Return a line for each option that most runs set, in groups."""
    command = parser.prog.rpartition(" ")[2]
    lines = [f"usage: {usage_of_run(parser.prog)}", "", *_head(command), ""]
    actions = list(_actions(parser))
    hidden = [action for action in actions if _is_hidden(action, command)]
    for group, title in TITLES.items():
        shown = [action for action in actions if _group_of(action.dest) == group and action not in hidden]
        lines += [title, *(_row(action, command) for action in shown)]
        if group == "trainer" and hidden:
            lines.append(f"  and {len(hidden)} more: lora-lightning {command} --help trainer")
        lines.append("")
    return "\n".join(lines).rstrip()


def _head(command: str) -> list[str]:
    """Return the lines with the command's purpose and where to find further help."""
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
    """Yield the options with a value, without those that jsonargparse adds, which the head explains."""
    groups = {action.dest.rpartition(".")[0] for action in parser.options() if not action.dest.endswith(".help")}
    for action in parser.options():
        has_value = action.option_strings and not action.dest.endswith(".help") and action.dest not in groups
        if has_value and action.help != SUPPRESS and action.dest not in ("help", SUPPRESS):
            yield action


def _is_hidden(action: Action, command: str) -> bool:
    """Return whether only `--help trainer` shows an option: few runs set it, or only training needs it."""
    group, _, name = action.dest.partition(".")
    return group == "trainer" and (name not in TRAINER or (command != "fit" and name in TO_TRAIN))


def _row(action: Action, command: str) -> str:
    text = sentence(action.help or "")
    if action.dest == "ckpt_path":
        text = CHECKPOINT.get(command, CHECKPOINT["other"])
    if action.dest in ("data", "model.task"):
        text = f"class_path and init_args: {', '.join(classes_of(action.dest))}, or your own"
    flags = ", ".join(str(option) for option in action.option_strings if not option.endswith("+"))
    end = _default(action)
    few: dict[str, Any] = {} if action.dest in ("data", "model.task") else {"max_lines": 2, "placeholder": f" ...{end}"}
    return textwrap.fill(
        text + end,
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
    """Return a docstring's first sentence without markup."""
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


BASES = ("TableData", "Task", "StepOutput")
"""Classes that users subclass."""


def classes_of(key: str) -> list[str]:
    """Return the names of this package's classes for `data` or `model.task`."""
    import lora_lightning

    where, ending = ("lora_lightning.data.", "Data") if key == "data" else ("lora_lightning.tasks.", "")
    return sorted(
        name
        for name, module in lora_lightning._WHERE.items()
        if module.startswith(where) and name.endswith(ending) and name[0].isupper() and name not in BASES
    )


# ---- everything: jsonargparse's screen, shortened

KNOWN = re.compile(r",\s+known\s+subclasses:([^()]*)(?=\)\n)")


def has_groups(parser: Any) -> bool:
    """Return whether the parser is of a command with a whole config."""
    return any(action.dest == "model.lora.r" for action in parser.options())


def usage_of_run(prog: str) -> str:
    """Return the usage line of a command with a config, without its hundred flags."""
    prog = prog.replace(" [options]", "").replace("__main__.py", "lora-lightning")
    trained = prog.rpartition(" ")[2] in FROM_CHECKPOINT
    return f"{prog} {'--ckpt_path RUN [-c CONFIG ...]' if trained else '-c CONFIG [-c CONFIG ...]'} [options]"


def shorten_subclasses(listed: re.Match[str]) -> str:
    """Return the public ones of a list of known subclasses, or nothing where there are too many."""
    names = re.sub(r"\s+", "", listed[1]).split(",")
    public = [name for name in names if not re.match(r"lora_lightning(\.\w+){2,}$|accelerate\.|transformers\.", name)]
    if len(public) > 30:
        return ""
    filled = textwrap.fill(", ".join(public), 54, break_long_words=False)
    return ", known subclasses:\n" + textwrap.indent(filled, " " * 24)
