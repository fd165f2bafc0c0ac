"""Where files are: on disk, or inside an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lora_lightning.lora.errors import LoRAError

SCHEME = "package:"


def resolve(path: str) -> str:
    """`package:NAME/inner/path` as the file in that installed package, found without importing it; else unchanged.

    Raises:
        LoRAError: the package is not installed, or holds no such file.
    """
    if not path.startswith(SCHEME):
        return path
    name, _, inner = path.removeprefix(SCHEME).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise LoRAError(f"'{path}' names the package '{name}', which is not installed: pip install it")
    found = Path(spec.submodule_search_locations[0]) / inner
    if not found.exists():
        raise LoRAError(f"the package '{name}' holds no '{inner}'")
    return str(found)
