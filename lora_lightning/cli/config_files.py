"""Config files before they are parsed: what is wrong in one is said with its file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lora_lightning.lora.errors import LoRAError, near_misses

ENDINGS = {".yaml", ".yml"}

PLAINLY = (
    (r"found character '?\\?t?'? ?that cannot start any token", "a tab cannot indent YAML: put spaces in its place"),
    (r"found unexpected end of stream", "a quote or bracket that was opened is not closed before the file ends"),
    (r"mapping values are not allowed", "a second ': ' in one line: put the value into quotes, or begin a new line"),
    (r"could not find expected ':'", "a key without ': ' after it"),
    (
        r"did not find expected key|expected <block end>|did not find expected '-' indicator",
        "this line does not stand under those above it: indent it as its neighbours are",
    ),
    (
        r"did not find expected ',' or|expected ',' or",
        "a list or map in brackets lacks a comma or its closing bracket",
    ),
    (
        r"found undefined alias",
        "an alias (*name) without its anchor (&name): put a text with * in front into quotes",
    ),
    (r"expected a single document", "a second document begins here (---): keep one in a file"),
    (r"expected '?<document start>", "a config is YAML: 'key: value' in each line"),
)
"""What YAML's own messages mean."""


VARIABLE = re.compile(r"\$\{(?:oc\.\w+|env|hydra|now):[^}]*\}?")
NULL = "tag:yaml.org,2002:null"


def named(args: Sequence[str]) -> list[str]:
    """The values of `-c` and `--config`, in their order: later ones win."""
    found = [arg.partition("=")[2] or follower for arg, follower in pairwise([*args, ""]) if _is_flag(arg)]
    return [value for value in found if value]


def _is_flag(arg: str) -> bool:
    return arg in ("-c", "--config") or arg.startswith("--config=")


def check(args: Sequence[str]) -> None:
    """Each config file of a command line.

    Raises:
        LoRAError: one is missing, no UTF-8, no YAML, empty, says a key twice, or is no map of keys.
    """
    for value in named(args):
        if "\n" not in value and "{" not in value and "://" not in value:
            check_file(Path(value))


def check_file(file: Path) -> None:
    """As `check`, of one file."""
    if file.is_dir():
        inside = sorted(path.name for path in file.iterdir() if path.suffix in ENDINGS)
        held = f": it holds {', '.join(inside[:4])}" if inside else " without a YAML file"
        raise LoRAError(f"--config {file} is a folder{held}; name a file")
    if not file.is_file():
        raise LoRAError(f"no config file {file}{_meant(file)}")
    root = tree(file)
    if root is None or (root.tag == NULL and not root.value):  # or of --- alone
        raise LoRAError(f"{file} is empty: a config holds keys with values, such as those of configs/demo.yaml")
    if not isinstance(root, yaml.MappingNode):
        got = "a list" if isinstance(root, yaml.SequenceNode) else f"the text '{root.value[:40]}'"
        raise LoRAError(f"{file} must hold keys with values, such as 'name: demo', got {got}")
    for node in _mappings(root):
        _refuse_twice(file, node)
    _refuse_all_empty(file, root)
    _refuse_variables(file, root)


def text_of(file: Path) -> str:
    """A file's text.

    Raises:
        LoRAError: it is no UTF-8.
    """
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise LoRAError(f"{file}, line {line}: not UTF-8: save the file as UTF-8 in your editor") from error


def tree(file: Path) -> yaml.Node | None:
    """A file's YAML with its lines; None where it is empty.

    Raises:
        LoRAError: it is no UTF-8 or no YAML.
    """
    text = text_of(file)
    if file.suffix == ".json":  # which may be indented by tabs, and can have none elsewhere
        text = text.replace("\t", " ")
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        told = f"{error.context or ''} {error.problem or ''}".strip()
        plain = next((said for pattern, said in PLAINLY if re.search(pattern, told)), told)
        opened = plain.startswith("a quote") and error.context_mark
        mark = error.context_mark if opened else error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise LoRAError(f"{file}{where}: {plain}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise LoRAError(f"{file}, line {line}: a character that no text holds: is this a YAML file?") from error


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
    for inner in _inner(node):
        yield from _mappings(inner)


def _refuse_twice(file: Path, node: yaml.MappingNode) -> None:
    """YAML's readers keep the last and say nothing."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line, name = key.start_mark.line + 1, str(key.value)
        if name in seen and name != "<<":
            raise LoRAError(f"{file}, line {line}: '{name}' is there twice, first in line {seen[name]}: keep one")
        seen[name] = line


def _refuse_all_empty(file: Path, root: yaml.MappingNode) -> None:
    """Such as a section all of whose keys are commented out: jsonargparse takes the file for a text.

    A null that is written is a value: an overlay may take something back by it.
    """
    if root.value and all(value.tag == NULL and not value.value for _, value in root.value):
        key, _ = root.value[0]
        line = key.start_mark.line + 1
        raise LoRAError(f"{file}, line {line}: '{key.value}' holds nothing: give it keys or a value, or leave it out")


def _refuse_variables(file: Path, root: yaml.Node) -> None:
    """OmegaConf's and Hydra's: here they would be taken as they stand, as the name of a folder, say."""
    for node in _scalars(root):
        if found := VARIABLE.search(node.value):
            raise LoRAError(
                f"{file}, line {node.start_mark.line + 1}: a config has no variables such as {found[0]}: write the"
                ' value, or give it as a flag, where a shell fills in "$NAME"'
            )


def _scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    for inner in _inner(node):
        yield from _scalars(inner)


def _inner(node: yaml.Node) -> Iterator[yaml.Node]:
    """The entries of a list, keys and values of a map, and nothing else's."""
    for child in node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []:
        yield from child if isinstance(child, tuple) else (child,)


def _meant(file: Path) -> str:
    """Files of about this name in that folder, or of this name further down."""
    if not file.parent.is_dir():
        near = near_misses(file.parent.name, [p.name for p in _entries(file.parent.parent) if p.is_dir()], 1)
        beside = [file.parent.parent / name / file.name for name in near]
        found = [path for path in beside if path.is_file()] or [path.parent for path in beside]
    else:
        files = [path for path in _entries(file.parent) if path.suffix in {*ENDINGS, ".json"}]
        same = [path for path in files if path.stem == file.stem]
        found = same or [file.parent / name for name in near_misses(file.name, [path.name for path in files], 2)]
        below = Path("configs").rglob(file.name) if file.name == str(file) else ()
        found = sorted(below)[:2] or found
    if not found:
        return f": looked for in {'this folder' if str(file.parent) == '.' else file.parent}"
    return "; did you mean " + " or ".join(f"'{path}'" for path in found) + "?"


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
