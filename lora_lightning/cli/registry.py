"""The commands by group, each with its line on the first screen; a command's imports happen when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

REST = "..."


class Command(NamedTuple):
    """One command."""

    line: str
    """Its description on the first screen."""
    function: str | None = None
    """`module:function` whose signature and docstring are its `--help`; None for those of LightningCLI."""
    positional: str | None = None
    """The argument without a flag."""
    nargs: str = "?"
    """How often it is there: `?` at most once, `+` at least once, or `REST`, every flag which is not the command's."""
    help: str = ""
    """Its help."""


GROUPS: dict[str, dict[str, Command]] = {
    "train, and use what was trained": {
        "fit": Command("train what a config describes"),
        "validate": Command("a trained run on its validation set"),
        "test": Command("a trained run on its test set"),
        "predict": Command("a trained run on new rows, into predictions.jsonl"),
        "plan": Command(
            "what a config will train and cost, without a weight",
            "lora_lightning.commands.registry_commands:plan",
            "fit",
            REST,
        ),
        "sweep": Command(
            "fits of one config with other values of some flags, ranked",
            "lora_lightning.commands.registry_commands:sweep",
            "fit",
            REST,
        ),
        "export": Command("a trained run as PEFT adapter and merged model, each compared with it"),
    },
    "adapters on disk": {
        "merge": Command(
            "fold an adapter into a model's files, shard by shard", "lora_lightning.commands.registry_commands:merge"
        ),
        "analyze": Command(
            "how much of its rank an adapter uses, and how far it moved its model",
            "lora_lightning.commands.registry_commands:analyze",
            "adapters",
            "+",
            "Adapters: directories, run folders or checkpoints.",
        ),
    },
    "your own": {
        "new": Command(
            "a project from the template, with configs, data, a backbone, a task and tests",
            "lora_lightning.commands.new:new",
            "folder",
            help="A new or empty folder, whose name is the project's.",
        ),
    },
    "this machine": {
        "doctor": Command(
            "versions, devices, extras, and whether a tiny fit works", "lora_lightning.commands.doctor:doctor"
        ),
    },
}


FROM_CHECKPOINT = ("validate", "test", "predict", "export")
"""Commands on a trained run, which need no --config where --ckpt_path leads to one."""

ENTRIES: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}

COMMANDS = {name: command for name, command in ENTRIES.items() if command.function}
"""Commands that need no config."""


def function_of(name: str) -> Callable[..., Any]:
    """Import and return the function of one of `COMMANDS`."""
    module, _, function = str(COMMANDS[name].function).partition(":")
    command: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return command
