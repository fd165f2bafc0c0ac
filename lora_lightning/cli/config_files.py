"""Config files before they are parsed: their checks, with errors that name file and line, and their keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml

from lora_lightning.lora.errors import LoRAError, near_misses, suggestion

ENDINGS = (".yaml", ".yml", ".json")
GONE = dict.fromkeys(
    ("deepspeed-zero2.yaml", "deepspeed-zero3.yaml", "fsdp1.yaml", "fsdp2-folder.yaml", "fsdp2-tp.yaml"),
    ": it is gone, take configs/strategy/fsdp2.yaml, or ddp.yaml where W0 fits on one device",
)
"""Configs of earlier versions, and their replacements."""
NULL = "tag:yaml.org,2002:null"


class Setting(NamedTuple):
    """One key of the command line or of a config file."""

    key: str
    """Dotted; keys of maps in a list belong to the list."""
    value: str | None
    """Its text; None for a list or a map."""
    place: str = ""
    """`FILE, line N: `, or nothing for a flag."""
    made: str = ""
    """The class path that stands beside it, or beside the `init_args` that it stands in."""


def config_values(args: Sequence[str]) -> list[str]:
    """Return the values of `-c` and `--config` in their order, of which the later ones win."""
    values = []
    for arg, follower in pairwise([*args, ""]):
        flag, equals, value = arg.partition("=")
        if flag in ("-c", "--config"):
            values.append(value if equals else follower)
    return [value for value in values if value]


def settings_of(args: Sequence[str]) -> Iterator[Setting]:
    """Yield all settings in the order in which they win: flags, the last first, then config files, the last first."""
    for arg, follower in reversed([*pairwise([*args, ""])]):
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--"):
            yield Setting(name.removesuffix("+"), value if equals else follower)
    for file in reversed([Path(value) for value in config_values(args)]):
        for path, node, made in _maps(_yaml_tree(file) if file.is_file() else None):
            for key, value in node.value:
                text = str(value.value) if isinstance(value, yaml.ScalarNode) else None
                yield Setting(f"{path}{key.value}", text, f"{file}, line {_line(key)}: ", made)


def _maps(node: yaml.Node | None, path: str = "", made: str = "") -> Iterator[tuple[str, yaml.MappingNode, str]]:
    """Yield each map, outer ones first, with the start of its keys and the class that is made with them."""
    if isinstance(node, yaml.MappingNode):
        made = next((str(value.value) for key, value in node.value if key.value == "class_path"), made)
        yield path, node, made
        for key, value in node.value:
            yield from _maps(value, f"{path}{key.value}.", made if key.value == "init_args" else "")
    for item in node.value if isinstance(node, yaml.SequenceNode) else []:
        yield from _maps(item, path)


def check(args: Sequence[str]) -> None:
    """Check each config file of a command line.

    Raises:
        LoRAError: a file is missing, no UTF-8, no YAML, empty, repeats a key, or is no map of keys.
    """
    for value in config_values(args):
        if "\n" not in value and "{" not in value and "://" not in value:
            check_file(Path(value))


def check_file(file: Path) -> None:
    """Check one file, as `check` does."""
    if file.is_dir():
        inside = sorted(path.name for path in file.iterdir() if path.suffix in ENDINGS)
        content = f": it holds {', '.join(inside[:4])}" if inside else " without a YAML file"
        raise LoRAError(f"--config {file} is a folder{content}; name a file")
    if not file.is_file():
        raise LoRAError(f"no config file {file}{GONE.get(file.name) or _near_files(file)}")
    root = _yaml_tree(file)
    if root is None or (root.tag == NULL and not root.value):  # or of --- alone
        raise LoRAError(f"{file} is empty: a config holds keys with values, such as those of configs/demo.yaml")
    if not isinstance(root, yaml.MappingNode):
        got = "a list" if isinstance(root, yaml.SequenceNode) else f"the text '{root.value[:40]}'"
        raise LoRAError(f"{file} must hold keys with values, such as 'name: demo', got {got}")
    for _, node, _ in _maps(root):
        first: dict[str, int] = {}  # of a repeated key YAML's readers silently keep the last
        for key, _ in node.value:
            line, name = _line(key), str(key.value)
            if name in first and name != "<<":
                raise LoRAError(f"{file}, line {line}: '{name}' is there twice, first in line {first[name]}: keep one")
            first[name] = line
    # jsonargparse reads a file without any value as a text. An explicit null is a value: an overlay resets one by it.
    if root.value and all(value.tag == NULL and not value.value for _, value in root.value):
        key, _ = root.value[0]
        raise LoRAError(
            f"{file}, line {_line(key)}: '{key.value}' holds nothing: give it keys or a value, or leave it out"
        )


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _yaml_tree(file: Path) -> yaml.Node | None:
    """Return a file's YAML nodes, which know their lines; None where the file is empty.

    Raises:
        LoRAError: it is no UTF-8 or no YAML, with YAML's message.
    """
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise LoRAError(f"{file}, line {line}: not UTF-8: save the file as UTF-8 in your editor") from error
    if file.suffix == ".json":  # tabs may only indent it
        text = text.replace("\t", " ")
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        begun = f" that begins in line {error.context_mark.line + 1}" if error.context_mark else ""
        context = f"{error.context}{begun}, " if error.context else ""
        raise LoRAError(f"{file}{where}: no YAML: {context}{error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise LoRAError(f"{file}, line {line}: a character that no text holds: is this a YAML file?") from error


def _near_files(file: Path) -> str:
    """Name files with a similar name in that folder, or with this name in a similar folder or below configs/."""
    folder = file.parent
    if folder.is_dir():
        files = [path.name for path in folder.iterdir() if path.suffix in ENDINGS]
        same = [name for name in files if Path(name).stem == file.stem]
        below = sorted(Path("configs").rglob(file.name))[:2] if file.name == str(file) else []
        existing = below or [folder / name for name in same or near_misses(file.name, files, 2)]
    else:
        beside = [path.name for path in folder.parent.glob("*") if (path / file.name).is_file()]
        existing = [folder.parent / name / file.name for name in near_misses(folder.name, beside, 1)]
    return suggestion(existing) or f": looked for in {'this folder' if str(folder) == '.' else folder}"
