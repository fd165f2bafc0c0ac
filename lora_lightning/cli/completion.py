"""`lora-lightning completion bash|zsh`: the script that completes commands, options and their values."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from lora_lightning.cli.help_screens import classes_of, sentence
from lora_lightning.cli.registry import ENTRIES
from lora_lightning.lora.errors import MissingPackageError


def completion(shell: Literal["bash", "zsh", "tcsh"]) -> None:
    """Print the script that lets a shell complete commands, options and their values.

    `eval "$(lora-lightning completion bash)"` tries it. Made in seconds and kept in a file, it is loaded at once: for
    bash ~/.local/share/bash-completion/completions/lora-lightning, for zsh _lora-lightning in a folder of fpath.

    Args:
        shell: the shell that will read it.
    """
    try:
        import shtab
    except ImportError as error:
        raise MissingPackageError("completion needs shtab: pip install 'lora_lightning[completion]'") from error
    print(shtab.complete(plain_parser(), shell))


def plain_parser() -> argparse.ArgumentParser:
    """The command's options for shtab: jsonargparse's own way would list each subclass of nn.Module with its arguments,
    which takes minutes and makes a script of megabytes."""
    from lora_lightning.cli.main import parser_of_all

    whole: Any = parser_of_all()
    plain = argparse.ArgumentParser(prog="lora-lightning")
    commands = plain.add_subparsers(dest="command")
    for name, parser in whole._subcommands_action._name_parser_map.items():
        own = commands.add_parser(name, help=ENTRIES[name].line, add_help=False)
        for action in parser._actions:
            _add(own, action)
    for name in ENTRIES.keys() - whole._subcommands_action._name_parser_map.keys():
        commands.add_parser(name, help=ENTRIES[name].line, add_help=False)  # it parses its arguments itself
    return plain


def _add(parser: argparse.ArgumentParser, action: Any) -> None:
    """One option, or one argument that is given without its name."""
    import shtab

    if action.help == argparse.SUPPRESS:
        return
    options = [option for option in action.option_strings if not option.endswith("+")]
    told = sentence(action.help or "").replace("%", "%%")
    kwargs: dict[str, Any] = {"help": told, "choices": _values(action)}
    if isinstance(action, argparse._HelpAction):
        kwargs["nargs"] = "?"
    elif not options:
        kwargs["nargs"] = action.nargs
    added = parser.add_argument(*(options or [action.dest]), **kwargs)
    last = action.dest.rpartition(".")[2]
    if last.endswith("_dir"):
        added.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif last in ("config", "ckpt_path", "path", "adapter", "adapters", "base_model", "init_adapter"):
        added.complete = shtab.FILE  # type: ignore[attr-defined]


def _values(action: Any) -> list[str] | None:
    """What an option can be set to, where that is a short list."""
    if isinstance(action, argparse._HelpAction):
        return ["all", "run", "model", "lora", "data", "trainer"]
    if action.dest in ("data", "model.task"):
        return [f"lora_lightning.{name}" for name in classes_of(action.dest)]
    kind = getattr(action, "_typehint", None)
    if kind is bool:
        return ["true", "false"]
    values = [value for part in (kind, *get_args(kind)) if get_origin(part) is Literal for value in get_args(part)]
    return [str(value) for value in values if isinstance(value, str)] or None
