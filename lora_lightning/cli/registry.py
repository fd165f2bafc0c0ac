"""The commands by group, each with its line on the first screen; what they need is imported when one is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command."""

    line: str
    """What it does, for the first screen."""
    function: str | None = None
    """`module:function` whose signature and docstring are its `--help`; None for those of LightningCLI."""
    positional: str | None = None
    """The argument that is given without its name; more than once where it is a list."""
    help: str = ""
    """Of a list that is given so, what it holds."""
    rest: str | None = None
    """The argument that takes every flag that is not the command's own."""


GROUPS: dict[str, dict[str, Command]] = {
    "train, and use what was trained": {
        "fit": Command("train what a config describes"),
        "validate": Command("a trained run on its validation set"),
        "test": Command("a trained run on its test set"),
        "predict": Command("a trained run on new rows, into predictions.jsonl"),
        "plan": Command(
            "what a config will train and cost, without a weight",
            "lora_lightning.commands.registry_commands:plan",
            rest="fit",
        ),
        "sweep": Command(
            "fits of one config with other values of some flags, ranked",
            "lora_lightning.commands.registry_commands:sweep",
            rest="fit",
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
            "Adapters: directories, run folders or checkpoints.",
        ),
    },
    "your own": {
        "new": Command(
            "a project from the template, with configs, data, a backbone, a task and tests",
            "lora_lightning.commands.new:new",
            "folder",
            "A new or empty folder, by whose name the project is called.",
        ),
    },
    "this machine": {
        "doctor": Command(
            "versions, devices, extras, and whether a tiny fit works", "lora_lightning.commands.doctor:doctor"
        ),
    },
}


FROM_CHECKPOINT = ("validate", "test", "predict", "export")
"""Commands that work on a trained run, and need no --config where --ckpt_path leads to one."""

ENTRIES: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}

COMMANDS = {name: command for name, command in ENTRIES.items() if command.function}
"""Those that need no config."""


def function_of(name: str) -> Callable[..., Any]:
    """Import and return the function of one of `COMMANDS`."""
    module, _, function = str(COMMANDS[name].function).partition(":")
    command: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return command
