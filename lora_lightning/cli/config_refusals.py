"""What jsonargparse takes for a config, and fails on only where it makes the classes, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lightning.cli.class_paths import wrong_path
from lora_lightning.cli.config_places import place_of
from lora_lightning.lora.errors import LoRAError


def refuse_no_keys(config: Any, args: Sequence[str]) -> None:
    """jsonargparse takes anything for a group of keys, and fails where it makes the class.

    Raises:
        LoRAError: trainer, model or model.lora is a list, a text or null.
    """
    for key in ("trainer", "model", "model.lora"):
        value = config.get(key)
        if value is None or isinstance(value, str | list | int | float):
            place = place_of(key, args)
            got = "null: leave it out for its defaults" if value is None else repr(value)
            raise LoRAError(
                f"{f'{place}: ' if place else ''}{key}: expected keys with values such as {{r: 8}}, got {got}"
            )


def refuse_no_class(strategy: Any) -> None:
    """A strategy may be a name as well as a class path, so that jsonargparse lets a mistyped path be.

    Raises:
        LoRAError: it has the form of a path, and leads nowhere.
    """
    if isinstance(strategy, str) and "." in strategy and (wrong := wrong_path(strategy)):
        raise LoRAError(f"trainer.strategy: {wrong}")


def refuse_no_name(name: str) -> None:
    """Raise where a run would not lie in `runs_dir`."""
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise LoRAError(f"name: expected that of a folder within runs_dir, got '{name}': --runs_dir says where runs go")
