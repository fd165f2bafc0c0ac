"""The command's parsers, which answer a mistake in one line; commands without a config need no Lightning."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lora_lightning.cli.diagnostics import explain
from lora_lightning.cli.help import KNOWN, ShowHelp, has_groups, shorten_subclasses, usage_of_run
from lora_lightning.cli.registry import COMMANDS, function_of


@dataclass
class CommandLine:
    """The words and the parsers of one command, shared by its parsers."""

    words: list[str] = field(default_factory=list)
    """The user's words, with a trained run's config in front where the command adds it."""
    parsers: list[OneLine] = field(default_factory=list)
    """The command's, and those of its subcommands."""


class OneLine(ArgumentParser):
    """A parser that answers a mistake in one line instead of a screen of usage."""

    def __init__(self, *args: Any, line: CommandLine | None = None, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False  # `--model.lora.rank` must not be taken for rank_pattern
        wanted = kwargs.pop("add_help", True)
        super().__init__(*args, add_help=False, **kwargs)
        self.line = line or CommandLine()
        self.line.parsers.append(self)
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
        if self.exit_on_error and self is self.line.parsers[0]:
            self.line.words = list(map(str, sys.argv[1:] if args is None else args))
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what to do, and exit with 2; a class's parser leaves that to the command's."""
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        words = self.line.words
        command = str(getattr(self, "subcommand", None) or self.prog.rpartition(" ")[2])
        known = self.options_of(words[0] if words else "")  # files are read by the parser of all commands
        print(f"lora-lightning: error: {explain(message, words, known, command)}", file=sys.stderr)
        sys.exit(2)

    def options_of(self, command: str) -> list[str]:
        """Return the flags of a subcommand, or of the parser itself where there is none of that name."""
        inner = {getattr(parser, "subcommand", None): parser for parser in self.line.parsers}
        return [option for action in inner.get(command, self).options() for option in action.option_strings]

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


def command_parser(name: str) -> OneLine:
    """Make the parser of a command that needs no config."""
    function, entry = function_of(name), COMMANDS[name]
    described = (inspect.getdoc(function) or "").partition("\n")[0]
    parser = (PassingOn if entry.rest else OneLine)(prog=f"lora-lightning {name}", description=described)
    positional = entry.positional
    parameters = inspect.signature(function).parameters
    several = positional is not None and str(parameters[positional].annotation).startswith("list")
    optional = positional is not None and parameters[positional].default is not inspect.Parameter.empty
    if positional is not None and (several or optional):
        parser.add_argument(positional, nargs="+" if several else "?", type=str, help=entry.help)
        skip: set[str | int] | None = {positional}
    else:
        skip = {entry.rest} if entry.rest else None
    parser.add_function_arguments(
        function, as_group=False, skip=skip, as_positional=positional is not None and skip is None
    )
    if isinstance(parser, PassingOn):
        parser.passed_as = str(entry.rest)
        parser.lists = frozenset(f"--{key}" for key, one in parameters.items() if "list[str] | None" in one.annotation)
    needed = [action for action in parser.options() if action.required]
    parser.usage = " ".join([parser.prog, *map(_usage, needed), "[options]"])
    return parser


def _usage(action: argparse.Action) -> str:
    """Return a required argument as the usage line shows it."""
    word = action.dest.upper()
    if action.option_strings:
        return f"{action.option_strings[-1]} {word}"
    return f"{word.removesuffix('S')} [{word.removesuffix('S')} ...]" if action.nargs == "+" else word


class PassingOn(OneLine):
    """A parser that collects every flag which is not its own for the command that it runs."""

    passed_as = ""
    lists: frozenset[str] = frozenset()
    """Options that take several words."""

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse: an option takes the words up to the next flag, and a list all values of its repeated flags."""
        words, others = self._divide(list(sys.argv[1:] if args is None else args))
        config = super().parse_args(words, *rest, **kwargs)
        config[self.passed_as] = others
        return config

    def _divide(self, words: list[str]) -> tuple[list[str], list[str]]:
        by_option: dict[str, list[str]] = {}
        flags = self.options_of("")
        others: list[str] = []
        current = None
        for word in words:
            option, equals, value = word.partition("=")
            if not word.startswith("-"):
                (others if current is None else by_option[current]).append(word)
            elif option not in flags:
                current = None
                others.append(word)
            else:
                current = option
                before = by_option.get(option, []) if option in self.lists else []  # else the later one wins
                by_option[option] = [*before, *([value] if equals else [])]
            if current is not None and current not in self.lists and by_option[current]:
                current = None
        arguments = []
        for option, values in by_option.items():
            arguments += [f"{option}={json.dumps(values)}"] if option in self.lists else [option, *values]
        return arguments, others


def run_command(name: str, args: list[str]) -> None:
    """Run a command that needs no config."""
    function = function_of(name)
    config = command_parser(name).parse_args(with_values(args, function.__annotations__))
    function(**config.as_dict())


def with_values(args: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Add the value of a switch without one: `--json` becomes `--json true`."""
    switches = {f"--{name}" for name, kind in types.items() if kind is bool or str(kind).startswith("bool")}
    words = []
    for arg, follower in pairwise([*args, "--"]):
        words += [arg, "true"] if arg in switches and follower.startswith("-") else [arg]
    return words
