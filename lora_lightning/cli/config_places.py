"""Where a config says something: file and line of a key, and the whole path of a key whose end is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lora_lightning.cli.config_files import named, tree


def place_of(key: str, args: Sequence[str], value: str | None = None) -> str | None:
    """`FILE, line N` of the last config file that says a dotted key; None where none does, or a flag says it.

    Args:
        key: such as `model.lora.r`; keys of a list's maps are counted as the list's.
        args: of the command.
        value: the text that stands there, where a list may have several.
    """
    if any(arg.partition("=")[0].rstrip("+") == f"--{key}" for arg in args):
        return None
    for file, root in _trees(args):
        for path, name, node in _leaves(root, ""):
            if path == key and value in (None, node.value):
                return f"{file}, line {name.start_mark.line + 1}"
    return None


def whole_key(last: str, value: str | None, args: Sequence[str]) -> str:
    """The dotted path of a key of which a parser's message gives the end: of a flag, or of a config file.

    Args:
        last: the end, such as `batch_size`.
        value: what was given there, where the message says so.
        args: of the command.
    """
    flags = [arg.partition("=")[0].removeprefix("--").rstrip("+") for arg in args if arg.startswith("--")]
    leaves = [leaf for _, root in _trees(args) for leaf in _leaves(root, "")]
    # a list or map is not compared: a message shows it in Python's words
    paths = [(path, node.value if isinstance(node, yaml.ScalarNode) else value) for path, _, node in leaves]
    for path, given in [*((flag, value) for flag in reversed(flags)), *paths]:
        if f".{path}".endswith(f".{last}") and value in (None, given):
            return path
    return last


def value_of(key: str, args: Sequence[str]) -> str | None:
    """The text that a flag, or else the last config file, gives for a dotted key."""
    for arg, follower in pairwise([*args, ""]):
        if arg.partition("=")[0] == f"--{key}":
            return arg.partition("=")[2] or follower
    for _, root in _trees(args):
        for path, _, node in _leaves(root, ""):
            if path == key and isinstance(node, yaml.ScalarNode):
                return str(node.value)
    return None


def classes_given(option: str, args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and class path of each place in the config files that gives a class an argument of this name."""
    for _, root in _trees(args):
        for path, _, node in _leaves(root, ""):
            said = {key.value: value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
            inside = said.get("init_args")
            if isinstance(inside, yaml.MappingNode) and option in (key.value for key, _ in inside.value):
                yield f"{path}.init_args.{option}", str(said["class_path"].value) if "class_path" in said else ""


def _trees(args: Sequence[str]) -> Iterator[tuple[Path, yaml.Node | None]]:
    """The config files that can be read, the last first."""
    for file in reversed(list(map(Path, named(args)))):
        if file.is_file():
            yield file, tree(file)


def _leaves(node: yaml.Node | None, path: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Dotted path, key and value of all that a file says, outer ones first."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            yield inner, key, value
            yield from _leaves(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            if path and isinstance(value, yaml.MappingNode):
                yield path, value, value
            yield from _leaves(value, path)
