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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_lightning.cli.exit_codes import CODES
from lora_lightning.cli.registry import ENTRIES, FROM_CHECKPOINT, GROUPS
from lora_lightning.lora.errors import LoRAError, did_you_mean

# ---- the first screen

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
    for title, commands in GROUPS.items():
        parts.append("\n".join([title, *(f"  {name:<12}{command.line}" for name, command in commands.items())]))
    codes = [f"  {code:<5}{meaning}" for code, meaning in CODES.items()]
    return "\n\n".join([*parts, EXAMPLES, OPTIONS, "\n".join(["exit codes", *codes])])


def command_words(args: list[str]) -> list[str]:
    """Return the words with a command in front; none where the first screen or the version has answered them.

    Raises:
        LoRAError: the first word is no command.
        SystemExit: with 2 where there are no arguments at all.
    """
    if not args:
        print(front_page(), file=sys.stderr)
        sys.exit(2)
    first, *rest = args
    if first in ENTRIES:
        return args
    if first in ("-h", "--help", "help"):
        if rest:
            return command_words([rest[0], "--help", *rest[1:]])
        print(front_page())
        return []
    if first in ("--version", "-V"):
        print(f"lora_lightning {version('lora_lightning')}")
        return []
    if first in GONE:
        raise LoRAError(f"'{first}' is no command any more: {GONE[first]}")
    if (config := Path(first).suffix in (".yaml", ".yml")) or first.startswith("-"):
        named = next((arg for arg in args if arg in ENTRIES), "fit")
        words = ["-c", first] if config else [arg for arg in args if arg != named]
        raise LoRAError(f"a command comes first: lora-lightning {' '.join([named, *words])}")
    meant = f": here it is '{ELSEWHERE[first]}'" if first in ELSEWHERE else did_you_mean(first, ENTRIES)
    raise LoRAError(f"no command '{first}'{meant} (there are {', '.join(ENTRIES)})")


# ---- a command's screen

TITLES = {
    "run": "the run",
    "model": "model: what is trained, and how",
    "lora": "model.lora: what is adapted",
    "data": "data: where the rows are",
    "trainer": "trainer: Lightning's own",
}
"""The groups of options."""

TO_TRAIN = (
    *("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "val_check_interval"),
    *("check_val_every_n_epoch", "limit_train_batches", "log_every_n_steps"),
)
TRAINER = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "fast_dev_run", "callbacks", "logger"),
    *TO_TRAIN,
)
"""Options of the Trainer that most runs set, and those of them that matter only in training."""

COLUMN = 31
"""Column of the options' texts, after all but the longest names."""


class ShowHelp(argparse.Action):
    """Prints the screen of `--help`, `--help all` and `--help GROUP`."""

    def __init__(self, option_strings: list[str], dest: str = SUPPRESS, **_: Any) -> None:
        super().__init__(option_strings, SUPPRESS, nargs="?", default=SUPPRESS, metavar="all", help="this screen")

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(screen(parser, values))
        parser.exit()


def screen(parser: Any, word: str | None = None) -> str:
    """Return the screen of `--help`: the short one, everything, or one group."""
    everything, groups = str(parser.format_help()), TITLES if has_groups(parser) else {}
    if word == "all" or not (word or groups):
        return everything
    if not word:
        return short_screen(parser)
    if word not in groups:
        return f"--help {word}: no such group{did_you_mean(word, ['all', *groups])} ({', '.join(['all', *groups])})"
    sections = {part: re.search(r"^ +(?:-\w \w+, )?--([\w.]+)", part, re.M) for part in everything.split("\n\n")}
    return "\n\n".join(
        part for part, flag in sections.items() if flag and "-->" not in part and _group_of(flag[1]) == word
    )


def _group_of(key: str) -> str:
    first = "lora" if key.startswith("model.lora") else key.partition(".")[0]
    return first if first in TITLES else "run"


def short_screen(parser: Any) -> str:
    """Return a line for each option that most runs set, in groups."""
    command = parser.prog.rpartition(" ")[2]
    example = f"{command} --ckpt_path runs/demo" if command in FROM_CHECKPOINT else "fit -c configs/demo.yaml"
    line = ENTRIES[command].line
    lines = [
        f"usage: {usage_of_run(parser.prog)}",
        "",
        f"{line[:1].upper()}{line[1:]}.",
        f"For example: {example}",
        "",
        f"  {command} --help all        every option with all that is told of it, or of a group:",
        f"  {command} --help trainer    run, model, lora, data or trainer",
        f"  {command} --data.help CLASS the arguments of a class; so do --model.task.help,",
        "        --model.backbone.help, --model.optimizer.help, --trainer.callbacks.help ...",
    ]
    rows: dict[str, list[str]] = {group: [] for group in TITLES}
    hidden = 0
    options = [action for action in parser.options() if not action.dest.endswith(".help")]
    prefixes = {action.dest.rpartition(".")[0] for action in options}
    for action in options:
        if not action.option_strings or action.dest in prefixes or SUPPRESS in (action.help, action.dest):
            continue  # jsonargparse's own, such as a file for a whole group
        group, _, name = action.dest.partition(".")
        if group == "trainer" and (name not in TRAINER or (command != "fit" and name in TO_TRAIN)):
            hidden += 1
        else:
            rows[_group_of(action.dest)].append(_row(action, command))
    rows["trainer"].append(f"  and {hidden} more: lora-lightning {command} --help trainer")
    for group, title in TITLES.items():
        lines += ["", title, *rows[group]]
    return "\n".join(lines)


def _row(action: Action, command: str) -> str:
    """Return an option's first sentence and its default, or what we say of it instead."""
    text, default, fold = first_sentence(action.help or ""), _default(action), 2
    if action.dest == "ckpt_path":
        newest = "go on from auto (the newest), last, best," if command == "fit" else "what to use: best, last,"
        text = f"{newest} a run folder or a .ckpt file"
    elif action.dest in ("data", "model.task"):
        text, fold = f"class_path and init_args: {', '.join(classes_of(action.dest))}, or your own", 9
    flags = ", ".join(option for option in action.option_strings if not option.endswith("+"))
    return textwrap.fill(
        text + default,
        min(max(shutil.get_terminal_size().columns, 72), 120),
        initial_indent=f"  {flags:<{COLUMN - 3}} ",
        subsequent_indent=" " * COLUMN,
        break_on_hyphens=False,
        break_long_words=False,
        max_lines=fold,
        placeholder=f" ...{default}",
    )


def first_sentence(text: str) -> str:
    """Return a docstring's first sentence without markup."""
    text = re.sub(r" \([^()]*arXiv[^()]*\)", "", " ".join(text.split()))
    first = re.split(r"(?<=[a-z0-9)`])[.;:](?:\s|$)", text, maxsplit=1)[0]
    return first.replace("`", "")


def _default(action: Action) -> str:
    value = action.default
    if isinstance(value, dict) and "class_path" in value:
        value = str(value["class_path"]).rpartition(".")[2]
    if value in (None, SUPPRESS, "", [], {}) or not isinstance(value, str | int | float | list):
        return ""
    return f" ({str(value).lower() if isinstance(value, bool) else value})"


def classes_of(key: str) -> list[str]:
    """Return the names of this package's classes for `data` or `model.task`, less those that users subclass."""
    import lora_lightning

    where, ending = ("lora_lightning.data.", "Data") if key == "data" else ("lora_lightning.tasks.", "")
    return sorted(
        name
        for name, module in lora_lightning._WHERE.items()
        if module.startswith(where) and name.endswith(ending) and name[0].isupper()
        if name not in ("TableData", "Task", "StepOutput")
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
