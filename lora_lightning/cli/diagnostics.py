"""Finds what is wrong with a command line, and says it with file, line and near misses.

A parser's message says that something is wrong. The cause is looked up in the words and the config files: an unknown
flag or key, a class path that does not exist, an argument that a class does not take, a value of another type.
Otherwise the parser's message stays, on one line.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

import lora_lightning
from lora_lightning.cli.config_files import config_values, yaml_tree
from lora_lightning.cli.other_tools import instead_of
from lora_lightning.cli.registry import ENTRIES, FROM_CHECKPOINT
from lora_lightning.lora.errors import REMOVED, LoRAError, did_you_mean, first_few, near_misses

REQUIRED = re.compile(r"the following arguments are required: ([\w., ]+)")
UNKNOWN = re.compile(r"unrecognized arguments: (.*)")
KEY = re.compile(r"Parser key \"([^\"]*)\": ")
VALUE = re.compile(r"(?:Got|Given) value: (.*)$")
EXPECTED = re.compile(r"Subtypes: \[(.*)\] Errors:|Expected an? (?:typing\.)?(<class '[\w.]+'>|Literal\[[^\]]*\])")
"""The types that a value was tried for."""
AROUND = re.compile(
    r"(?: - Expected an? <class 'NoneType'>| - Not a valid|\.? Got value: Namespace\(| Given value type: )"
    r".*?(?= Given value: (?!\{)|$)"
)
"""Parts of a message about the surrounding values."""
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


@dataclass(frozen=True)
class Setting:
    """One key of the command line or of a config file."""

    key: str
    """Dotted; keys of maps in a list belong to the list."""
    value: str | None
    """Its text; None for a list or a map."""
    place: str
    """`FILE, line N: `, or nothing for a flag."""
    inside: tuple[str, ...] = ()
    """The keys of a map."""


def explain(message: str, words: Sequence[str], known: Iterable[str], command: str = "") -> str:
    """Return one line that explains a parser's message and says what to do.

    Args:
        message: jsonargparse's.
        words: of the command line.
        known: option strings of the parser that raised it.
        command: its name.
    """
    text = " ".join(str(message).split())
    keys = [option.removeprefix("--") for option in known if option.startswith("--") and not option.endswith("+")]
    if text.startswith("the following") and (match := REQUIRED.match(text)):
        return _missing_arguments(match[1].split(", "), words, command)
    if (match := UNKNOWN.match(text)) and not match[1].startswith("-"):
        return _stray_word(match[1].split(maxsplit=1)[0], words)
    settings = list(settings_of(words))
    for line in (_unknown_key(settings, keys), _wrong_class(settings, keys), _wrong_argument(settings, keys)):
        if line is not None:
            return line
    if match := UNKNOWN.match(text):
        option = match[1].partition("=")[0].partition(" ")[0]
        return f"unknown option {option}{_replacement(option.lstrip('-').replace('-', '_'), keys, '--')}"
    return _wrong_value(text, settings)


def settings_of(words: Sequence[str]) -> Iterator[Setting]:
    """Yield all settings in the order in which they win: flags, the last first, then config files, the last first."""
    flags = []
    for word, follower in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            flags.append(Setting(name.removesuffix("+"), value if equals else follower, ""))
    yield from reversed(flags)
    for file in reversed(list(map(Path, config_values(words)))):
        if file.is_file():
            yield from _leaves(yaml_tree(file), "", str(file))


def _leaves(node: yaml.Node | None, path: str, file: str) -> Iterator[Setting]:
    """Yield the keys below a node, outer ones first."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for key, value in pairs:
        inner = f"{path}.{key.value}" if path else str(key.value)
        yield _setting(inner, value, file, key)
        yield from _leaves(value, inner, file)
    for value in node.value if isinstance(node, yaml.SequenceNode) else []:
        if isinstance(value, yaml.MappingNode):
            yield _setting(path, value, file, value)
        yield from _leaves(value, path, file)


def _setting(path: str, value: yaml.Node, file: str, at: yaml.Node) -> Setting:
    inside = tuple(str(key.value) for key, _ in value.value) if isinstance(value, yaml.MappingNode) else ()
    text = str(value.value) if isinstance(value, yaml.ScalarNode) else None
    return Setting(path, text, f"{file}, line {at.start_mark.line + 1}: ", inside)


# ---- what is missing, and what stands alone


def _missing_arguments(names: Sequence[str], words: Sequence[str], command: str) -> str:
    if not any("." in name for name in names):
        positional = ENTRIES[command].positional if command in ENTRIES else None
        wanted = [name.upper().removesuffix("S") if name == positional else f"--{name}" for name in names]
        return f"{command} needs {' and '.join(wanted)}: see lora-lightning {command} --help"
    command = words[0] if words else command
    files = config_values(words)
    if not files and command in FROM_CHECKPOINT:
        return f"{command} needs a trained run: lora-lightning {command} --ckpt_path RUN, such as runs/demo, or a .ckpt"
    if not files:
        return f"{command} needs a config: lora-lightning {command} -c CONFIG, such as configs/demo.yaml"
    keys = " and ".join(name.removeprefix(f"{command}.") for name in names)
    where = f"{' and '.join(files)} {'says' if len(files) == 1 else 'say'}"
    return f"{where} nothing of {keys}: add it, as configs/demo.yaml does, or put the run's config before it"


def _stray_word(word: str, words: Sequence[str]) -> str:
    if Path(word).suffix in (".yaml", ".yml"):
        return f"'{word}' stands alone: a config is given as -c {word}"
    if words[0] in FROM_CHECKPOINT and not any(one.startswith("--ckpt_path") for one in words):
        return f"'{word}' stands alone: a run is given as --ckpt_path {word}"
    name, equals, value = word.lstrip("+").partition("=")
    option = f"--{name} {value}" if equals else "--name value, several values as [a,b]"
    return f"'{word}' stands alone: an option is given as {option}"


# ---- flags and keys that there are not


def _outer_option(key: str, keys: Sequence[str]) -> str | None:
    """Return the option of a class or a map that a deeper key belongs to; None within a group of options."""
    parts = key.split(".")
    for count in range(len(parts) - 1, 0, -1):
        outer = ".".join(parts[:count])
        if outer in keys:
            group = any(option.startswith(f"{outer}.") and option != f"{outer}.help" for option in keys)
            return None if group else outer
    return None


def _unknown_key(settings: Sequence[Setting], keys: Sequence[str]) -> str | None:
    """Return a line on the first key that is no option, no group of options and not within an option."""
    for setting in settings:
        known = setting.key in keys or any(key.startswith(f"{setting.key}.") for key in keys)
        if known or not keys or _outer_option(setting.key, keys) is not None:
            continue
        if setting.place:
            return f"{setting.place}unknown key {setting.key}{_replacement(setting.key, keys, '')}"
        return f"unknown option --{setting.key}{_replacement(setting.key.replace('-', '_'), keys, '--')}"
    return None


def _replacement(name: str, keys: Sequence[str], dashes: str) -> str:
    """Return what to write for an unknown name: its name here, or near misses."""
    last, group, first = name.rpartition(".")[2], name.rpartition(".")[0], name.partition(".")[0]
    if (other := instead_of(last, keys, dashes)) is not None:
        return other
    same = [key for key in keys if key.rpartition(".")[2] == last]
    beside = [key for key in keys if key.rpartition(".")[0] == group]
    within = [key for key in keys if key.startswith(f"{first}.")] if group else []
    nearest = _near(name, same, dashes) or _near(name, beside, dashes) or _near(name, within, dashes)
    if nearest or within:
        part = "lora" if group == "model.lora" else first
        return nearest or f": --help {part} tells what there is"
    return _near(name, keys, dashes) or ": --help tells what there is"


def _near(name: str, keys: Iterable[str], dashes: str) -> str:
    """Suggest near names, which are compared by their last part, without their common prefix."""
    ends = {key.rpartition(".")[2]: key for key in keys}
    close = did_you_mean(name.rpartition(".")[2], ends)
    return re.sub(r"'(\w+)'", lambda end: f"'{dashes}{ends[end[1]]}'", close)


# ---- classes and their arguments


def _classes(settings: Sequence[Setting], keys: Sequence[str]) -> Iterator[tuple[str, Setting]]:
    """Yield the key and the class path of each option that takes a class."""
    for setting in settings:
        key = setting.key.removesuffix(".class_path")
        if setting.value and key.rpartition(".init_args.")[2].rpartition(".")[2] != "help" and f"{key}.help" in keys:
            yield key, setting


def _wrong_class(settings: Sequence[Setting], keys: Sequence[str]) -> str | None:
    """Return a line on the first class path that does not exist."""
    for key, setting in _classes(settings, keys):
        path = str(setting.value)
        words = ("true", "false", "null", "None")
        if path in words or path.startswith(("{", "[")) or (setting.key == key and key == "trainer.strategy"):
            continue
        if setting.key == key and key == "trainer.logger" and path.islower() and "." not in path:
            near = [f"lora_lightning.{name}" for name in lora_lightning.__all__ if name.lower().startswith(path)]
            return f"{setting.place}{key}: expected a class_path, true or false, got '{path}'{_suggestion(near)}"
        if path.endswith(".from_pretrained"):
            how = "write class_path: lora_lightning.huggingface, and the class as init_args.auto_class"
            return f"{setting.place}{key}: {how}"
        if (wrong := wrong_path(path)) is not None:
            model = MODEL if key == "model.backbone" and "is no path to a class" in wrong else ""
            return f"{setting.place}{key}: {wrong}{model}"
    return None


def _wrong_argument(settings: Sequence[Setting], keys: Sequence[str]) -> str | None:
    """Return a line on the first argument that its class does not take, or key beside `class_path` and `init_args`."""
    for setting in settings:
        holder = _outer_option(setting.key, keys)
        if f"{setting.key}.help" in keys:
            odd = [name for name in setting.inside if name not in OWN_KEYS]
            if odd:
                meant = did_you_mean(odd[0], OWN_KEYS) or ": a class is given by class_path, its arguments by init_args"
                return f"{setting.place}unknown key {setting.key}.{odd[0]}{meant}"
            if setting.inside and "class_path" not in setting.inside and not _class_of(setting.key, settings):
                return f"{setting.place}{setting.key}: expected a class_path beside its init_args"
        if holder is None or f"{holder}.help" not in keys:
            continue
        name = setting.key.removeprefix(f"{holder}.").removeprefix("init_args.")
        if "." in name or name in (*OWN_KEYS, "help"):
            continue
        paths = [path for path in (_class_of(holder, settings, setting.place),) if path]
        taken = _arguments_of(paths[0]) if paths else None
        if taken and name not in taken:
            gone = f" any more: {REMOVED[name]}" if name in REMOVED else ""
            hint = gone or did_you_mean(name, taken) or f" (it takes {first_few(taken, 20)})"
            return f"{setting.place}{paths[0]} takes no '{name}'{hint}"
    return None


def _class_of(key: str, settings: Sequence[Setting], place: str = "") -> str | None:
    """Return the class path of an option; in a list of classes, the last one before a place in the same file."""
    holders = [setting for setting in settings if setting.key in (f"{key}.class_path", key) and setting.value]
    file, _, line = place.removesuffix(": ").partition(", line ")
    above = [
        setting for setting in holders if line and setting.place.startswith(f"{file}, ") and _line(setting) <= int(line)
    ]
    best = max(above, key=_line) if above else holders[0] if holders else None
    return None if best is None else best.value


def _line(setting: Setting) -> int:
    return int(setting.place.rpartition(" ")[0].rpartition(" ")[2].rstrip(":") or 0) if setting.place else 0


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
    full_names = {}
    for part in BY_NAME:
        names = getattr(importlib.import_module(part), "__all__", [])
        full_names.update({name: f"{part}.{name}" for name in names if name[0].isupper()})
    return full_names


def wrong_path(path: str) -> str | None:
    """Return why `path` does not exist, with near misses; None where it exists.

    Modules on the path are imported, as the command would do next.
    """
    parts = path.split(".")
    if parts[0] == "lora_lightning" and parts[-1] in (gone := {**REMOVED, **lora_lightning.GONE}):
        return f"'{path}': {gone[parts[-1]]}"
    if len(parts) == 1:
        known = {**short_names(), **{name: f"lora_lightning.{name}" for name in lora_lightning.__all__}}
        near = [known[name] for name in near_misses(path, known, 2)]
        return None if path in known else f"'{path}' is no path to a class, such as module.Class{_suggestion(near)}"
    found_object: Any = None
    for count, name in enumerate(parts):
        before = ".".join(parts[:count])
        if found_object is not None and hasattr(found_object, name):
            found_object = getattr(found_object, name)
            continue
        whole = f"{before}.{name}" if before else name
        if found_object is None or isinstance(found_object, ModuleType):
            try:
                found_object = importlib.import_module(whole)
                continue
            except ModuleNotFoundError as error:
                if error.name != whole:
                    return f"'{whole}' cannot be imported: {error}"
            except Exception as error:  # whatever a user's file raises
                return f"'{whole}' cannot be imported: {type(error).__name__}: {error}"
        if parts[0] == "lora_lightning" and parts[-1] in lora_lightning.__all__:  # by its former module
            return f"there is no '{whole}': take 'lora_lightning.{parts[-1]}'"
        return _missing_attribute(whole, before, name, found_object)
    return None


def _missing_attribute(whole: str, before: str, name: str, owner: Any) -> str:
    if owner is None:
        beside = [file.stem for file in Path.cwd().glob("*.py")]
        installed = {"lora_lightning", *importlib.metadata.packages_distributions()}
        near = near_misses(name, beside, 1) or near_misses(name, installed, 1)
        hint = _suggestion(near) or f": a file {name}.py of your own is looked for in the folder where the command runs"
        return f"there is no module '{name}'{hint}"
    inner = [module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", []))]
    public = [n for n in dir(owner) if not n.startswith("_") and callable(getattr(owner, n, None))]
    return f"there is no '{whole}'{_suggestion([f'{before}.{n}' for n in near_misses(name, [*inner, *public])])}"


def _suggestion(names: Sequence[str]) -> str:
    return "; did you mean " + " or ".join(f"'{name}'" for name in names) + "?" if names else ""


# ---- values


def _wrong_value(text: str, settings: Sequence[Setting]) -> str:
    """Return a line on a value of the wrong type; types without plain words keep the parser's message."""
    matches = list(KEY.finditer(text))
    if not matches:
        return text
    key, tail = (
        matches[-1][1],
        AROUND.sub("", text[matches[-1].end() :]),
    )  # the innermost parser's, less the outer ones'
    got = VALUE.search(tail)
    value = got[1].strip("'\" ") if got else None
    places = [one for one in settings if f".{one.key}".endswith(f".{key}")]
    whole = next((one for one in places if value in (None, one.value)), places[0] if places else None)
    start = f"{whole.place}{whole.key}: " if whole else f"{key}: "
    types = " ".join(part for pair in EXPECTED.findall(tail) for part in pair)
    choices = list(dict.fromkeys(re.findall(r"'([^' ]+)'", re.sub(r"<class '[\w.]+'>", "", types))))
    if start.endswith("precision: "):
        choices = [choice for choice in PRECISIONS if choice in choices]  # typing may keep them in another order
    names = dict.fromkeys(re.findall(r"<class '(?:\w+\.)*(\w+)'>", types))
    plain = [TYPES[name] for name in names if name in TYPES and not choices]
    if value is None or value.startswith(("{", "[")) or not (plain or choices):
        short = tail.split(" - ")[-1].strip()
        return f"{start}{short if len(short) < 240 else short[:240] + ' ...'}"
    expected = ", ".join(choices) or " or ".join(plain)
    return f"{start}expected {expected}, got '{'null' if value == 'None' else value}'{did_you_mean(value, choices)}"


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
            from lora_lightning.training.tracking.wandb_logger import refuse_no_key

            refuse_no_key()
    strategy = config.get("trainer.strategy")
    if isinstance(strategy, str) and "." in strategy and (wrong := wrong_path(strategy)):
        raise LoRAError(f"trainer.strategy: {wrong}")
