"""The command's parsers: a mistake is answered with one line, and a command without a config needs no Lightning."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lora_lightning.command_list import COMMANDS, ENTRIES, POSITIONAL
from lora_lightning.help_all import whole
from lora_lightning.help_screens import ShowHelp
from lora_lightning.mistakes import told

GIVEN: ContextVar[Sequence[str] | None] = ContextVar("GIVEN", default=None)
"""The arguments of the command that runs; left out, those of the process."""


class OneLine(ArgumentParser):
    """Answers a mistake with one line instead of a screen of usage."""

    needed: Sequence[str] = ()
    """What has to be given, for the usage line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False  # `--model.lora.rank` must not be taken for rank_pattern
        wanted = kwargs.pop("add_help", True)
        super().__init__(*args, add_help=False, **kwargs)
        if wanted:
            self.add_argument("-h", "--help", action=ShowHelp)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """All options, each with all that is told of it."""
        return whole(self, str(super().format_help(*args, **kwargs)))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what to do, and exit with 2; a class's own parser leaves that to the command's."""
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        given = GIVEN.get()
        args = sys.argv[1:] if given is None else given
        command = str(getattr(self, "subcommand", None) or self.prog.rpartition(" ")[2])
        inner = self._subcommands_action._name_parser_map if self._subcommands_action else {}
        asked = inner.get(args[0], self) if args else self  # files are read by the parser of all commands
        known = [option for action in asked._actions for option in action.option_strings]
        print(f"lora-lightning: error: {told(message, args, known, command)}", file=sys.stderr)
        sys.exit(2)


def command_parser(name: str) -> OneLine:
    """The parser of a command that needs no config."""
    function = COMMANDS[name]
    described = (inspect.getdoc(function) or "").partition("\n")[0]
    parser = OneLine(prog=f"lora-lightning {name}", description=described)
    skip: set[str | int] = set()
    if name in POSITIONAL:
        word = POSITIONAL[name]
        several = str(function.__annotations__[word]).startswith("list")
        optional = inspect.signature(function).parameters[word].default is not inspect.Parameter.empty
        if several or optional:
            parser.add_argument(word, nargs="+" if several else "?", type=str, help=ENTRIES[name].help)
            skip.add(word)
    parser.add_function_arguments(function, skip=skip, as_positional=name in POSITIONAL and not skip)
    parser.needed = [action.dest for action in parser._actions if action.required]
    return parser


def run_command(name: str, args: list[str]) -> None:
    """Run a command that needs no config."""
    token = GIVEN.set(args)
    try:
        given = command_parser(name).parse_args(_with_values(args, COMMANDS[name].__annotations__))
    finally:
        GIVEN.reset(token)
    COMMANDS[name](**given.as_dict())


def _with_values(args: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """`--json` as `--json true`, where a switch stands alone."""
    switches = {f"--{name}" for name, kind in types.items() if kind in ("bool", bool)}
    found = []
    for arg, follower in pairwise([*args, "--"]):
        found += [arg, "true"] if arg in switches and follower.startswith("-") else [arg]
    return found
