"""The command's parsers, which answer a mistake in one line; commands without a config need no Lightning."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lora_lightning.cli.diagnostics import explain
from lora_lightning.cli.help import KNOWN, ShowHelp, has_groups, shorten_subclasses, usage_of_run
from lora_lightning.cli.registry import COMMANDS, REST, function_of


class OneLine(ArgumentParser):
    """A parser that answers a mistake in one line instead of a screen of usage.

    Args:
        words: the list of the user's words, which the parsers of a command share.
    """

    def __init__(self, *args: Any, words: list[str] | None = None, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False  # `--model.lora.rank` must not be taken for rank_pattern
        wanted = kwargs.pop("add_help", True)
        super().__init__(*args, add_help=False, **kwargs)
        self.words = [] if words is None else words
        if wanted:
            self.add_argument("-h", "--help", action=ShowHelp)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the long help: every option with its whole text."""
        if has_groups(self):
            self.usage = usage_of_run(self.prog)
        return KNOWN.sub(shorten_subclasses, str(super().format_help(*args, **kwargs)))

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse as jsonargparse does, but pass `null` to a class's parser as null and not as the text None."""
        if not self.exit_on_error and args and str(args[0]).endswith("=None"):
            args = [f"{args[0].removesuffix('None')}null", *args[1:]]
        if self.exit_on_error and getattr(self, "subcommand", None) is None:
            self.words[:] = map(str, sys.argv[1:] if args is None else args)
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what to do, and exit with 2; a class's parser leaves that to the command's."""
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        known = self.options_of(*self.words[:1])  # files are read by the parser of all commands
        line = explain(message, self.words, known, self.prog.rpartition(" ")[2])
        print(f"lora-lightning: error: {line}", file=sys.stderr)
        sys.exit(2)

    def options_of(self, command: str = "") -> list[str]:
        """Return the flags of a subcommand, or of the parser itself where there is none of that name."""
        choices = [action.choices for action in self.options() if isinstance(action.choices, Mapping)]
        parser = next((parsers[command] for parsers in choices if command in parsers), self)
        return [option for action in parser.options() for option in action.option_strings]

    def options(self) -> list[argparse.Action]:
        """Return all actions, those of classes and functions too, as argparse hands them to its usage formatter."""
        actions_of_all: list[argparse.Action] = []

        class Reader(argparse.HelpFormatter):
            def add_usage(self, usage: Any, actions: Any, *args: Any, **kwargs: Any) -> None:
                actions_of_all.extend(actions)

        before, self.formatter_class = self.formatter_class, Reader
        self.format_usage()
        self.formatter_class = before
        return actions_of_all


class PassingOn(OneLine):
    """A parser that hands every flag which is not its own to the `fit` that it runs."""

    several: tuple[str, ...] = ()
    """Its options of several texts, each of which takes the words up to the next flag, as often as it is there."""

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse; what is left over is `config.fit`."""
        own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for action in self.options():
            how: dict[str, Any] = {"nargs": "?", "const": action.const or ""} if action.nargs == "?" else {}
            if action.dest in self.several:
                how = {"nargs": "*", "action": "extend"}
            own.add_argument(action.option_strings[-1].rstrip("+"), default=argparse.SUPPRESS, **how)
        try:
            given, others = own.parse_known_args(args)
        except argparse.ArgumentError as error:
            self.error(str(error))
        words = [f"--{name}={json.dumps(v) if isinstance(v, list) else v}" for name, v in vars(given).items()]
        config = super().parse_args(words, *rest, **kwargs)
        config.fit = others
        return config


def command_parser(name: str) -> OneLine:
    """Make the parser of a command that needs no config."""
    function, entry = function_of(name), COMMANDS[name]
    described = (inspect.getdoc(function) or "").partition("\n")[0]
    parser = (PassingOn if entry.nargs == REST else OneLine)(prog=f"lora-lightning {name}", description=described)
    if entry.positional and entry.nargs != REST:
        parser.add_argument(entry.positional, nargs=entry.nargs, type=str, help=entry.help)
    parser.add_function_arguments(function, as_group=False, skip={entry.positional or ""})
    types = {key: str(kind) for key, kind in function.__annotations__.items()}
    if isinstance(parser, PassingOn):
        parser.several = tuple(key for key, kind in types.items() if kind == "list[str] | None")
    parser.usage = parser.prog
    for action in parser.options():
        word = action.dest.upper()
        if types.get(action.dest, "").startswith("bool"):
            action.nargs, action.const = "?", True  # `--json` is `--json true`
        if action.required and action.option_strings:
            parser.usage += f" {action.option_strings[-1]} {word}"
        elif action.required:
            parser.usage += f" {word.removesuffix('S')} [{word.removesuffix('S')} ...]"
    parser.usage += " [options]"
    return parser


def run_command(name: str, args: list[str]) -> None:
    """Run a command that needs no config."""
    function_of(name)(**command_parser(name).parse_args(args).as_dict())
