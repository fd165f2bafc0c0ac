"""Checks of the options of `new` before anything is written."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.commands.projects.origin import installable
from lora_lightning.commands.projects.render import TEMPLATE
from lora_lightning.lora.errors import LoRAError, did_you_mean

NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
TAKEN = ("tests", "configs", "data")
"""Folders that a project has beside its package."""


def check_name(name: str) -> str:
    """The name, if it can name a distribution, a folder and (with _ for -) a Python package.

    Raises:
        LoRAError: it cannot, with a similar name that can.
    """
    module = name.replace("-", "_")
    if not NAME.fullmatch(name):
        raise LoRAError(
            f"a project's name is lower-case letters and digits, joined by _ or -, got '{name}': try '{_mend(name)}'"
        )
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module in TAKEN:
        raise LoRAError(f"'{name}' means something else in Python or in the project: try '{name}_project'")
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != Path.cwd()]
    spec = PathFinder.find_spec(module, elsewhere)
    if spec is not None and spec.origin is not None:
        raise LoRAError(f"'{name}' would hide the installed package '{module}': try '{name}_project'")
    return name


def _mend(name: str) -> str:
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    mended = "_".join(words) or "my_project"
    return mended if mended[0].isalpha() else f"project_{mended}"


def refuse_occupied(target: Path) -> None:
    """Raise where `target` exists; an empty folder is allowed.

    Raises:
        LoRAError: it is a file, or a folder that is not empty.
    """
    if target.is_file() or target.is_symlink():
        raise LoRAError(f"'{target}' is there already and no folder: name a new one")
    if target.is_dir() and any(target.iterdir()):
        raise LoRAError(f"'{target}' is not empty, and nothing was written: name a new folder")


def questions() -> dict[str, Any]:
    """The template's questions by name, as its copier.yml has them."""
    read = yaml.safe_load((TEMPLATE / "copier.yml").read_text(encoding="utf-8"))
    return {name: entry for name, entry in read.items() if not name.startswith("_")}


def check_choices(answers: dict[str, str]) -> None:
    """Raise for an answer that is none of its question's choices.

    Raises:
        LoRAError: names the nearest choice.
    """
    by_name = questions()
    for name, value in answers.items():
        known = list(by_name[name].get("choices", {}).values())
        if known and value not in known:
            raise LoRAError(f"--{name} is one of {', '.join(known)}, got '{value}'{did_you_mean(value, known)}")


def requirement(package: str | None) -> str:
    """The requirement by which a project installs this package.

    Args:
        package: a folder or a file, an URL, versions such as `==0.1.0`; None for where this package was installed
            from, or a range of versions where that was an index.

    Raises:
        LoRAError: it is none of these.
    """
    package = package or installable()
    if package is None:
        return str(questions()["requirement"]["default"])
    if "://" in package:
        return f"lora_lightning @ {package}"
    versions = re.sub(r"^lora[-_]lightning", "", package).strip()
    if re.fullmatch(r"(==|>=|<=|~=|<|>|!=)[^\"]+", versions):
        return f"lora_lightning{versions}"
    if Path(package).exists():
        return f"lora_lightning @ {Path(package).resolve().as_uri()}"
    raise LoRAError(f"--package is a folder, a wheel, an URL or versions such as ==0.1.0; there is no '{package}'")
