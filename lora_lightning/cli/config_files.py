"""Checks config files before they are parsed, with errors that name file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lora_lightning.lora.errors import LoRAError, near_misses

ENDINGS = {".yaml", ".yml"}
GONE = dict.fromkeys(
    ("deepspeed-zero2.yaml", "deepspeed-zero3.yaml", "fsdp1.yaml", "fsdp2-folder.yaml", "fsdp2-tp.yaml"),
    ": it is gone, take configs/strategy/fsdp2.yaml, or ddp.yaml where W0 fits on one device",
)
"""Configs of earlier versions, and their replacements."""
NULL = "tag:yaml.org,2002:null"


def config_values(args: Sequence[str]) -> list[str]:
    """Return the values of `-c` and `--config` in their order, of which the later ones win."""
    existing = [arg.partition("=")[2] or follower for arg, follower in pairwise([*args, ""]) if _is_flag(arg)]
    return [value for value in existing if value]


def _is_flag(arg: str) -> bool:
    return arg in ("-c", "--config") or arg.startswith("--config=")


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
    root = yaml_tree(file)
    if root is None or (root.tag == NULL and not root.value):  # or of --- alone
        raise LoRAError(f"{file} is empty: a config holds keys with values, such as those of configs/demo.yaml")
    if not isinstance(root, yaml.MappingNode):
        got = "a list" if isinstance(root, yaml.SequenceNode) else f"the text '{root.value[:40]}'"
        raise LoRAError(f"{file} must hold keys with values, such as 'name: demo', got {got}")
    for node in _mappings(root):
        _refuse_twice(file, node)
    _refuse_all_empty(file, root)


def yaml_tree(file: Path) -> yaml.Node | None:
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


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
    for child in node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []:
        for inner in child if isinstance(child, tuple) else (child,):
            yield from _mappings(inner)


def _refuse_twice(file: Path, node: yaml.MappingNode) -> None:
    """Refuse a repeated key in one map: YAML's readers silently keep the last."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line, name = key.start_mark.line + 1, str(key.value)
        if name in seen and name != "<<":
            raise LoRAError(f"{file}, line {line}: '{name}' is there twice, first in line {seen[name]}: keep one")
        seen[name] = line


def _refuse_all_empty(file: Path, root: yaml.MappingNode) -> None:
    """Refuse a file without any value, such as one whose keys are comments: jsonargparse reads it as a text.

    An explicit null is a value: an overlay may reset something by it.
    """
    if root.value and all(value.tag == NULL and not value.value for _, value in root.value):
        key, _ = root.value[0]
        line = key.start_mark.line + 1
        raise LoRAError(f"{file}, line {line}: '{key.value}' holds nothing: give it keys or a value, or leave it out")


def _near_files(file: Path) -> str:
    """Name files with a similar name in that folder, or with this name in a similar folder or below configs/."""
    folder = file.parent
    if not folder.is_dir():
        above = folder.parent
        near = near_misses(folder.name, [p.name for p in above.iterdir() if p.is_dir()], 1) if above.is_dir() else []
        existing = [above / name / file.name for name in near if (above / name / file.name).is_file()]
    else:
        files = [path.name for path in folder.iterdir() if path.suffix in {*ENDINGS, ".json"}]
        same = [name for name in files if Path(name).stem == file.stem]
        below = sorted(Path("configs").rglob(file.name))[:2] if file.name == str(file) else []
        existing = below or [folder / name for name in same or near_misses(file.name, files, 2)]
    if not existing:
        return f": looked for in {'this folder' if str(folder) == '.' else folder}"
    return "; did you mean " + " or ".join(f"'{path}'" for path in existing) + "?"
