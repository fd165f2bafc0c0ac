"""What is wrong with a `class_path`, or with an argument below one, and what was probably meant."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import lora_lightning
from lora_lightning.cli.config_places import classes_given, place_of, value_of, whole_key
from lora_lightning.lora.errors import did_you_mean, near_misses, some

NAMED = re.compile(
    r"class_path['\"]?[:=]?\s*['\"]([\w.]+)['\"]|dot import path string: ([\w.-]*\w)"
    r"|[Gg](?:ot|iven) value: ((?:[a-z_]\w*\.)+[A-Z]\w*|[A-Z]\w+)$"
)
KEY = re.compile(r"Parser key \"([^\"]*)\": ")
OPTION = re.compile(r"Option '([\w.]+)' is not accepted")
MODEL = ": a model of the hub or of a folder is class_path lora_lightning.huggingface with its name as init_args\
.pretrained_model_name_or_path"
BY_NAME = (
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "strategies", "plugins.precision", "profilers")),
    *("torch.optim", "torch.optim.lr_scheduler"),
)
"""Where classes are that go by their short names too."""


def explained(message: str, args: Sequence[str]) -> str | None:
    """A parser's message anew where a class path in it leads nowhere, or where a class does not take an argument.

    Args:
        message: of jsonargparse.
        args: of the command, whose config files are looked at for the class that an argument was given to.
    """
    for found in NAMED.finditer(message):
        told = None if found[3] == "None" else wrong_path(found[1] or found[2] or found[3])
        if told is not None:
            key = KEY.search(message)
            if key and key[1].endswith("model.backbone") and "is no path to a class" in told:
                told += MODEL
            return (_before(key[1], found[1] or found[2] or found[3], args) if key else "") + told
    option = OPTION.search(message)
    return None if option is None else _wrong_option(option[1], args) or _no_class(option[1], args)


def _before(key: str, path: str, args: Sequence[str]) -> str:
    """Where a class path was given, in front of what is wrong with it."""
    place = place_of(f"{key}.class_path", args, path) or place_of(key, args, path)
    return f"{place}: {key}: " if place else f"{key}: "


def short_names() -> dict[str, str]:
    """Lightning's callbacks and loggers, torch's optimizers and so on: a config may name them without their modules."""
    found = {}
    for part in BY_NAME:
        names = getattr(importlib.import_module(part), "__all__", [])
        found.update({name: f"{part}.{name}" for name in names if name[0].isupper()})
    return found


def meant_class(word: str, kinds: Sequence[str]) -> str:
    """`"; did you mean 'lora_lightning.WandbLogger'?"` for `wandb` where a Logger is wanted, or an empty text."""
    found = {name: path for name, path in _names().items() if name.endswith(tuple(kinds)) and name not in kinds}
    return _meant([found[name] for name in near_misses(word, found, 2)]) if kinds else ""


def _names() -> dict[str, str]:
    """Whole paths by the names of classes that a config may be looked through for."""
    return {**short_names(), **{name: f"lora_lightning.{name}" for name in lora_lightning.__all__}}


def wrong_path(path: str) -> str | None:
    """Why `path` names nothing, with near misses; None where it names something.

    Modules on the way are imported: they are what the command would import next.
    """
    parts = path.split(".")
    if parts[0] == "lora_lightning" and parts[-1] in lora_lightning.GONE:
        return f"{path}: {lora_lightning.GONE[parts[-1]]}"
    if len(parts) == 1:
        known = _names()
        if path in known:
            return None
        near = [known[name] for name in near_misses(path, known, 2)]
        return f"'{path}' is no path to a class, such as module.Class{_meant(near)}"
    held: Any = None
    for count, name in enumerate(parts):
        before = ".".join(parts[:count])
        if held is not None and (inner := _attribute(held, name)) is not None:
            held = inner
            continue
        whole = f"{before}.{name}" if before else name
        if held is None or isinstance(held, ModuleType):
            try:
                held = importlib.import_module(whole)
                continue
            except ModuleNotFoundError as error:
                if error.name != whole:
                    return f"'{whole}' cannot be imported: {error}"
            except Exception as error:  # whatever a file of the user's own raises
                return f"'{whole}' cannot be imported: {type(error).__name__}: {error}"
        return _nothing_there(whole, before, name, held)
    return None


def _attribute(held: Any, name: str) -> Any:
    return getattr(held, name, None)


def _nothing_there(whole: str, before: str, name: str, held: Any) -> str:
    if held is None:
        beside = [file.stem for file in Path.cwd().glob("*.py")]
        installed = {"lora_lightning", *importlib.metadata.packages_distributions()}
        near = near_misses(name, beside, 1) or near_misses(name, installed, 1)
        hint = _meant(near) or f": a file {name}.py of your own is looked for in the folder where the command runs"
        return f"there is no module '{name}'{hint}"
    inner = [module.name for module in pkgutil.iter_modules(getattr(held, "__path__", []))]
    public = [n for n in dir(held) if not n.startswith("_") and callable(_attribute(held, n))]
    return f"there is no '{whole}'{_meant([f'{before}.{n}' for n in near_misses(name, [*inner, *public])])}"


def _meant(names: Sequence[str]) -> str:
    return "; did you mean " + " or ".join(f"'{name}'" for name in names) + "?" if names else ""


def _wrong_option(option: str, args: Sequence[str]) -> str | None:
    """Which class of the config files or flags was given the option that it does not take."""
    for key, path in _classes_with(option, args):
        full = short_names().get(path, path) if "." not in path else path
        module, _, name = full.rpartition(".")
        if not module or wrong_path(full) is not None:
            continue
        taken = _taken(getattr(importlib.import_module(module), name))
        if option not in taken:
            place = place_of(key, args)
            start = f"{place}: " if place else ""
            return f"{start}{path} takes no '{option}'{did_you_mean(option, taken) or f' (it takes {some(taken, 20)})'}"
    return None


def _no_class(option: str, args: Sequence[str]) -> str:
    """For a key beside or in the place of `class_path`, such as Hydra's `_target_`."""
    key = whole_key(option, None, args)
    place = place_of(key, args)
    meant = did_you_mean(option, ["class_path", "init_args"])
    how = meant or ": a class is given by class_path, and its arguments by init_args"
    return f"{f'{place}: ' if place else ''}unknown key {key}{how}"


def _taken(made_by: Any) -> list[str]:
    """Names of the arguments; those that go on to a base class as `**kwargs` are of that class."""
    of = inspect.signature(made_by).parameters
    taken = [name for name, one in of.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if inspect.isclass(made_by) and len(taken) < len(of):
        bases = made_by.__mro__[1:-1]
        taken += [n for base in bases[:1] for n in _taken(base) if n not in taken]
    return taken


def _classes_with(option: str, args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and class path of each place where the option is given, flags first."""
    for arg in args:
        flag = arg.partition("=")[0].removeprefix("--")
        if arg.startswith("--") and flag.endswith(f".{option}"):
            key = flag.removesuffix(f".{option}").removesuffix(".init_args")
            path = value_of(f"{key}.class_path", args) or value_of(key, args)
            if path:
                yield flag, path
    yield from classes_given(option, args)
