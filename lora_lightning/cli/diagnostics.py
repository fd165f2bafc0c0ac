"""Finds what is wrong with a command line, and says it with file, line and near misses.

A parser's message says that something is wrong. The cause is looked up in the words and the config files: an unknown
flag or key, a class path that does not exist, an argument that a class does not take, a value of another type.
Otherwise the parser's message stays, on one line.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import itertools
import pkgutil
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import lora_lightning
from lora_lightning.cli.config_files import Setting, config_values, settings_of
from lora_lightning.cli.other_tools import instead_of
from lora_lightning.cli.registry import ENTRIES, FROM_CHECKPOINT
from lora_lightning.lora.errors import REMOVED, LoRAError, did_you_mean, first_few, near_misses, suggestion

REQUIRED, UNKNOWN = "the following arguments are required: ", "unrecognized arguments: "
"""How argparse's messages begin."""
BY_NAME = (
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "strategies", "plugins.precision", "profilers")),
    *("torch.optim", "torch.optim.lr_scheduler"),
)
"""Modules whose classes may be named without the module."""
TYPES = {
    "int": "a whole number",
    "PositiveInt": "a whole number above 0",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list such as [a, b]",
    "dict": "keys with values such as {a: 1}",
}
PRECISIONS = ("auto", "float32", "bf16-base", "nf4-base", "bf16-mixed", "16-mixed", "64-true")
"""Precisions that can train an adapter: Lightning's others round it too, or need a package that is not for adapters."""
OWN_KEYS = ("class_path", "init_args", "dict_kwargs")
MODEL = (
    ": a model of the hub or of a folder is class_path lora_lightning.huggingface with its name as"
    " init_args.pretrained_model_name_or_path"
)


def explain(message: str, words: Sequence[str], known: Iterable[str], command: str = "") -> str:
    """Return one line that explains a parser's message and says what to do.

    Args:
        message: jsonargparse's.
        words: of the command line.
        known: option strings of the parser that raised it.
        command: its name.
    """
    text = " ".join(message.split())
    if text.startswith(REQUIRED):
        return _missing_arguments(text.removeprefix(REQUIRED).split(", "), words, command)
    unknown = text.removeprefix(UNKNOWN).split()[0] if text.startswith(UNKNOWN) else "-"
    if not unknown.startswith("-"):
        return _stray_word(unknown, words)
    keys = [option.removeprefix("--") for option in known if option.startswith("--") and not option.endswith("+")]
    settings = list(settings_of(words))
    for setting in settings if keys else ():
        if (line := _wrong_setting(setting, settings, keys)) is not None:
            return f"{setting.place}{line}"
    return (
        f"unknown option {unknown}: --help tells what there is" if unknown != "-" else _wrong_value(message, settings)
    )


# ---- what is missing, and what stands alone


def _missing_arguments(names: Sequence[str], words: Sequence[str], command: str) -> str:
    if not any("." in name for name in names):
        positional = ENTRIES[command].positional if command in ENTRIES else None
        wanted = [name.upper().removesuffix("S") if name == positional else f"--{name}" for name in names]
        return f"{command} needs {' and '.join(wanted)}: see lora-lightning {command} --help"
    command, files = words[0] if words else command, " and ".join(config_values(words))
    if files:
        keys = " and ".join(name.removeprefix(f"{command}.") for name in names)
        return f"{files}: no {keys}: add it, as configs/demo.yaml does, or put the run's config before it"
    if command in FROM_CHECKPOINT:
        return f"{command} needs a trained run: lora-lightning {command} --ckpt_path RUN, such as runs/demo, or a .ckpt"
    return f"{command} needs a config: lora-lightning {command} -c CONFIG, such as configs/demo.yaml"


def _stray_word(word: str, words: Sequence[str]) -> str:
    name, equals, value = word.lstrip("+").partition("=")
    meant = (
        f"an option is given as --{name} {value}" if equals else "an option is given as --name value or --name [a,b]"
    )
    if Path(word).suffix in (".yaml", ".yml"):
        meant = f"a config is given as -c {word}"
    elif words[0] in FROM_CHECKPOINT and not any(one.startswith("--ckpt_path") for one in words):
        meant = f"a run is given as --ckpt_path {word}"
    return f"'{word}' stands alone: {meant}"


# ---- keys, classes and their arguments


def _wrong_setting(setting: Setting, settings: Sequence[Setting], keys: Sequence[str]) -> str | None:
    """Return what is wrong with a key: there is none such, or its class, or the class takes no such argument."""
    key, parts = setting.key, setting.key.split(".")
    classes = {key.removesuffix(".help") for key in keys if key.endswith(".help")}
    outer = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    groups = {one for one in outer if one not in classes and any(known.startswith(f"{one}.") for known in keys)}
    option = next((one for one in outer if one in keys and one not in groups), None)
    if option is None and key not in groups:
        what = f"key {key}" if setting.place else f"option --{key}"
        return f"unknown {what}{_replacement(key, keys, '' if setting.place else '--')}"
    if option not in classes:
        return None  # as are keys of a map
    name = key.removeprefix(option).removeprefix(".").removeprefix("init_args.")
    if name in ("", "class_path"):
        return _wrong_class(option, setting, by_name=not name)
    made = setting.made or next(
        (s.value for s in settings if s.key in (f"{option}.class_path", option) and s.value), ""
    )
    if name == "init_args" and not made:
        return f"{option}: expected a class_path beside its init_args"
    if "." in name or name in OWN_KEYS:
        return None
    if setting.place and key == f"{option}.{name}":
        meant = did_you_mean(name, OWN_KEYS) or ": a class is given by class_path, its arguments by init_args"
        return f"unknown key {key}{meant}"
    taken = _arguments_of(made)
    if not taken or name in taken:
        return None
    gone = f" any more: {REMOVED[name]}" if name in REMOVED else ""
    return f"{made} takes no '{name}'{gone or did_you_mean(name, taken) or f' (it takes {first_few(taken, 20)})'}"


def _replacement(name: str, keys: Sequence[str], dashes: str) -> str:
    """Return what to write for an unknown name: its name here, or near misses by the last part."""
    group, _, last = name.replace("-", "_").rpartition(".")
    if (other := instead_of(last, keys, dashes)) is not None:
        return other
    first = group.partition(".")[0]
    within = [key for key in keys if key.startswith(f"{first}.")] if group else []
    same = [key for key in keys if key.rpartition(".")[2] == last]
    beside = [key for key in keys if key.rpartition(".")[0] == group]
    for candidates in (same, beside, within or keys):
        ends = {key.rpartition(".")[2]: key for key in candidates}
        if near := near_misses(last, ends):
            return suggestion(f"{dashes}{ends[end]}" for end in near)
    part = "lora" if group == "model.lora" else first
    return f": --help {part} tells what there is" if within else ": --help tells what there is"


def _wrong_class(option: str, setting: Setting, *, by_name: bool) -> str | None:
    """Return why an option's class does not exist; None where it does, or the value is another one."""
    path = setting.value or ""
    words = ("", "true", "false", "null", "None")
    if path in words or path.startswith(("{", "[")) or (by_name and option == "trainer.strategy"):
        return None
    if path.endswith(".from_pretrained"):
        return f"{option}: write class_path: lora_lightning.huggingface, and the class as init_args.auto_class"
    if (wrong := wrong_path(path)) is None:
        return None
    return f"{option}: {wrong}{MODEL if option == 'model.backbone' and 'is no path to a class' in wrong else ''}"


def _arguments_of(path: str) -> list[str]:
    """Return the names of a class's arguments, with those of the base class that gets its `**kwargs`."""
    full = short_names().get(path, path)
    module, _, name = full.rpartition(".")
    made_by = getattr(importlib.import_module(module), name, None) if module and wrong_path(full) is None else None
    taken: list[str] = []
    for target in inspect.getmro(made_by)[:-1] if inspect.isclass(made_by) else [made_by] if made_by else []:
        if inspect.isclass(target) and "__init__" not in vars(target):
            continue  # a mixin, whose signature is that of a later class
        parameters = inspect.signature(target).parameters.values()
        taken += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(dict.fromkeys(taken))


def short_names() -> dict[str, str]:
    """Return the full names of classes without a module, such as Lightning's callbacks and torch's optimizers."""
    parts = {part: getattr(importlib.import_module(part), "__all__", []) for part in BY_NAME}
    return {name: f"{part}.{name}" for part, names in parts.items() for name in names if name[0].isupper()}


def wrong_path(path: str) -> str | None:
    """Return why `path` does not exist, with near misses; None where it exists.

    Modules on the path are imported, as the command would do next.
    """
    first, *inner = names = path.split(".")
    ours = names[-1] if first == "lora_lightning" else ""
    if ours in (gone := {**REMOVED, **lora_lightning.GONE}):
        return f"'{path}': {gone[ours]}"
    if not inner:
        known = {**short_names(), **{name: f"lora_lightning.{name}" for name in lora_lightning.__all__}}
        near = [known[name] for name in near_misses(path, known, 2)]
        return None if path in known else f"'{path}' is no path to a class, such as module.Class{suggestion(near)}"
    owner: Any = None
    for count, name in enumerate(names):
        before, whole = ".".join(names[:count]), ".".join(names[: count + 1])
        if owner is not None and hasattr(owner, name):
            owner = getattr(owner, name)
            continue
        if owner is None or isinstance(owner, ModuleType):
            try:
                owner = importlib.import_module(whole)
                continue
            except ModuleNotFoundError as error:
                if error.name != whole:
                    return f"'{whole}' cannot be imported: {error}"
            except Exception as error:  # whatever a user's file raises
                return f"'{whole}' cannot be imported: {type(error).__name__}: {error}"
        if ours in lora_lightning.__all__:  # by its former module
            return f"there is no '{whole}': take 'lora_lightning.{ours}'"
        if owner is None:
            beside = [file.stem for file in Path.cwd().glob("*.py")]
            installed = {"lora_lightning", *importlib.metadata.packages_distributions()}
            near = near_misses(name, beside, 1) or near_misses(name, installed, 1)
            own = f": a file {name}.py of your own is looked for in the folder where the command runs"
            return f"there is no module '{name}'{suggestion(near) or own}"
        modules = [module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", []))]
        public = [n for n in dir(owner) if not n.startswith("_") and callable(getattr(owner, n, None))]
        return f"there is no '{whole}'{suggestion(f'{before}.{n}' for n in near_misses(name, [*modules, *public]))}"
    return None


# ---- values


def _wrong_value(message: str, settings: Sequence[Setting]) -> str:
    """Return a line on a value of the wrong type, in the parser's own words where the types have none here."""
    key, text = _innermost(message)
    if not key:
        return text
    reason, *values = re.split(r"(?:Got|Given) value(?: type)?: ", re.sub(r"\. Got value: Namespace\(.*", "", text))
    value = values[-1].strip("'\" ") if values and not values[-1].startswith("NestedArg(") else None
    places = [one for one in settings if f".{one.key}".endswith(f".{key}")]
    at = next((one for one in places if value in (None, one.value)), places[0] if places else Setting(key, None))
    choices = dict.fromkeys(re.findall(r"'([^' ]+)'", " ".join(re.findall(r"Literal(\[[^\]]*\])", reason))))
    if at.key.endswith("precision"):
        choices = dict.fromkeys(one for one in PRECISIONS if one in choices)
    types = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
    names = dict.fromkeys(types.findall(reason))
    expected = ", ".join(choices) or " or ".join(TYPES[name] for name in names if name in TYPES)
    if expected and value is not None and not value.startswith(("[", "{")):
        got = "null" if value == "None" else value
        return f"{at.place}{at.key}: expected {expected}, got '{got}'{did_you_mean(value, choices)}"
    dull = ("Expected a path", "Does not validate", "Expected a NoneType")
    reasons = [one for one in re.split(r"(?:^| )- ", types.sub(r"\1", reason)) if one and not one.startswith(dull)]
    why = reasons[0] if reasons else reason
    return f"{at.place}{at.key}: {why.strip()[:240]}{'' if value is None else f' Got value: {value}'}"


def _innermost(message: str) -> tuple[str, str]:
    """Return the last key of a message, and what is indented below it, on one line: the parsers of classes nest."""
    _, found, rest = message.rpartition('Parser key "')
    key, _, below = rest.partition('":') if found else ("", "", message)
    lines = [line for line in below.splitlines() if line.strip()] or [message]
    depth = len(lines[0]) - len(lines[0].lstrip())
    inside = itertools.takewhile(lambda line: not line[:depth].strip(), lines)
    return key, " ".join(" ".join(inside).split())


# ---- values that jsonargparse accepts, and fails on later or not at all


def refuse_config(config: Any, words: Sequence[str]) -> None:
    """Refuse invalid values that jsonargparse accepts.

    Raises:
        LoRAError: trainer, model or model.lora is no map; the run's folder is not within `runs_dir`; a strategy's path
            does not exist.
    """
    for key in ("trainer", "model", "model.lora"):
        value = config.get(key)
        if value is None or isinstance(value, str | list | int | float):
            place = next((one.place for one in settings_of(words) if one.key == key), "")
            got = "null: leave it out for its defaults" if value is None else repr(value)
            raise LoRAError(f"{place}{key}: expected keys with values such as {{r: 8}}, got {got}")
    name = str(config.get("name", "lora"))
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise LoRAError(f"name: expected that of a folder within runs_dir, got '{name}': --runs_dir says where runs go")
    loggers = config.get("trainer.logger")  # for a list jsonargparse would name the types that it tried, and no reason
    for logger in loggers if isinstance(loggers, list) else []:
        if str(logger.get("class_path")).endswith("WandbLogger") and logger.get("init_args.offline") is False:
            from lora_lightning.training.tracking.loggers import refuse_no_key

            refuse_no_key()
    strategy = config.get("trainer.strategy")
    if isinstance(strategy, str) and "." in strategy and (wrong := wrong_path(strategy)):
        raise LoRAError(f"trainer.strategy: {wrong}")
