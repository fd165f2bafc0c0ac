"""What a parser says of a mistake, said plainly: where it stands, what was expected, what came, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_lightning.cli.class_paths import KEY, explained, meant_class, wrong_path
from lora_lightning.cli.config_files import named
from lora_lightning.cli.config_places import place_of, whole_key
from lora_lightning.cli.other_tools import instead_of, misspelt
from lora_lightning.cli.registry import FROM_CHECKPOINT, POSITIONAL
from lora_lightning.lora.errors import REMOVED, did_you_mean

TUPLE = re.compile(r"Parser key \"([^\"]*)\": Expected a tuple with (\d+) elements\. Got value: (.*)")
UNION = re.compile(r"Parser key \"([^\"]*)\": .*?Subtypes: \[(.*)\] Errors: .*Given value: (.*)")
LITERAL = re.compile(r"Parser key \"([^\"]*)\": Expected a (?:typing\.)?(Literal\[.*\])\. Got value: (.*)")
PLAIN = re.compile(r"Parser key \"([^\"]*)\": Expected an? (<class '[\w.]+'>)\. Got value: ?(.*)")
NESTED = re.compile(r"Parser key \"([^\"]*)\": Unable to load config '(.*?)' - ")
NO_FUNCTION = re.compile(r"Parser key \"([^\"]*)\": .*Import path (\S+) does not correspond to a subclass of (\w+)")
NO_CLASS = re.compile(
    r"Parser key \"([^\"]*)\": .*?Not a valid subclass of (\w+)\. Got value: (None|\{.*?\}) Subclass types"
)
SEVERAL = re.compile(r"Parser key \"([^\"]*)\": .*?Multiple subclasses with name (\w+)\. .*? ambiguity: (.*?)\. ")
OF_ANOTHER_KIND = re.compile(
    r"Parser key \"([^\"]*)\": .*?Expected '([\w.]+)' to be a subclass of <class '(?:\w+\.)*(\w+)'>"
)
LACKS = re.compile(
    r"Parser key \"([^\"]*)\": .*?(?:callable class|class_path '[^']+'): the following arguments are required:"
    r" ([\w, ]+?)(?: - |$)"
)
NO_FUNCTION_AT_ALL = re.compile(r"Parser key \"([^\"]*)\": .*or a subclass spec, but got None")
IN_A_FILE = re.compile(r"Subcommand '(\w+)' does not accept option '([^']+)'|^Key '([^']+)' is not expected")
REQUIRED = re.compile(r"the following arguments are required: (.*)")
UNKNOWN = re.compile(r"unrecognized arguments: (.*)")
INNER = re.compile(
    r".*(?:Problem with given class_path '[^']+'|expects a function or a callable class): "
    r"((?:Parser key|Option|unrecognized arguments|Key ).*)"
)
"""What a class's own parser says, within what is said of the types that were tried."""
AROUND = re.compile(
    r"(?: - Expected an? <class 'NoneType'>| - Not a valid subclass|\. Got value: Namespace\("
    r"| Given value type: <class '(?:dict|list|jsonargparse)).*"
)
"""What comes after that."""
A_CLASS = re.compile(r"(?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*|[A-Z]\w+")
HYDRA = re.compile(r"\+{0,2}([A-Za-z_][\w.]*)=(.+)")
"""One of its overrides."""
OF_HELP = re.compile(r"(--[\w.]+\.help): module '([\w.]+)' has no attribute '(\w+)'")
NO_VALUE = re.compile(r"argument (?:-\w/)?(--[\w.]+)(?:/\S+)?: expected one argument")
TYPES = {
    "int": "a whole number",
    "positiveint": "a whole number above 0",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list such as [a, b]",
    "tuple": "a list such as [a, b]",
    "dict": "keys with values such as {a: 1}",
    "path": "a path",
    "tensor": "",  # which torch's optimizers take too, and a config cannot hold
}


def told(message: str, args: Sequence[str], known: Iterable[str], command: str = "") -> str:
    """A parser's message as one line that says what to do.

    Args:
        message: of jsonargparse.
        args: of the command.
        known: option strings of the parser that complains.
        command: its name.
    """
    text = " ".join(line.strip() for line in str(message).splitlines() if line.strip())
    if found := INNER.fullmatch(text):
        union = re.match(r"Parser key \"[^\"]*\": Does not validate .*? Given value: ", found[1])
        text = (union[0] if union else "") + AROUND.sub("", found[1][union.end() if union else 0 :])
    keys = {option.removeprefix("--") for option in known if option.startswith("--")}
    if found := REQUIRED.fullmatch(text):
        return _required(found[1].split(", "), args, command)
    if found := UNKNOWN.fullmatch(text):
        return _unknown_flag(found[1], keys, args)
    if found := IN_A_FILE.search(text):
        return _unknown_key(found[2] or found[3], keys, args)
    if found := TUPLE.search(text):
        return f"{_placed(whole_key(found[1], None, args), args)}expected {found[2]} values, got {found[3]}"
    if found := PLAIN.search(text):
        return _unfit(found[1], found[2], found[3], args)
    if "from_pretrained does not correspond" in text:
        key = KEY.search(text)
        start = f"{key[1]}: " if key else ""
        return f"{start}write class_path: lora_lightning.huggingface, and the class as init_args.auto_class"
    if found := NO_FUNCTION.search(text):
        return _no_function(found[1], found[2], found[3])
    if found := OF_ANOTHER_KIND.search(text):
        return f"{_placed(found[1], args)}'{found[2]}' is no subclass of {found[3]}: name one that is"
    if found := SEVERAL.search(text):
        return f"{found[1]}: there are several classes {found[2]}: write {' or '.join(found[3].split(', '))} in full"
    if found := LACKS.search(text):
        return f"{_placed(found[1], args)}the class needs {_listed(found[2].split(', '))} in its init_args"
    unfit = UNION.search(text) or LITERAL.search(text)
    if unfit and not A_CLASS.fullmatch(unfit[3]) and "<class '" in unfit[2] and unfit[3][0] not in "[{":
        return _unfit(unfit[1], unfit[2], unfit[3], args)
    if (said := explained(text, args)) is not None:
        return said
    if found := NO_CLASS.search(text):
        got = "null" if found[3] == "None" else f"{found[3]} without it"
        return f"{_placed(found[1], args)}expected a {found[2].lower()}, as class_path: and its init_args:, got {got}"
    if found := NO_FUNCTION_AT_ALL.search(text):
        return f"{_placed(found[1], args)}expected a class_path and its init_args, got null: leave it out"
    if unfit:
        return _unfit(unfit[1], unfit[2], unfit[3], args)
    if (found := OF_HELP.search(text)) and (wrong := wrong_path(f"{found[2]}.{found[3]}")):
        return f"{found[1]}: {wrong}"
    if found := NO_VALUE.fullmatch(text):
        return f"{found[1]} needs a value: {found[1]} {found[1].lstrip('-').rpartition('.')[2].upper()}"
    if found := NESTED.search(text):
        got = f"expected keys with values such as {{r: 8}}, or a YAML file, got '{found[2]}'"
        return f"{_placed(found[1], args)}{got}"
    return re.sub(r'^Parser key "([^"]*)": ', r"\1: ", text)


def _required(names: Sequence[str], args: Sequence[str], command: str) -> str:
    if not any("." in name for name in names):
        wanted = [name.upper().removesuffix("S") if name == POSITIONAL.get(command) else f"--{name}" for name in names]
        return f"{command} needs {_listed(wanted)}: see lora-lightning {command} --help"
    command = args[0] if args else command
    keys = [name.removeprefix(f"{command}.") for name in names]
    files = named(args)
    if not files and command in FROM_CHECKPOINT:
        return f"{command} needs a trained run: lora-lightning {command} --ckpt_path RUN, such as runs/demo, or a .ckpt"
    if not files:
        return f"{command} needs a config: lora-lightning {command} -c CONFIG, such as configs/demo.yaml"
    where = f"{_listed(files)} {'says' if len(files) == 1 else 'say'}"
    return f"{where} nothing of {_listed(keys)}: add it, as configs/demo.yaml does, or put the run's config before it"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _unknown_flag(given: str, keys: Iterable[str], args: Sequence[str]) -> str:
    first = given.split(maxsplit=1)[0]
    if not first.startswith("-"):
        if Path(first).suffix in (".yaml", ".yml"):
            return f"'{first}' stands alone: a config is given as -c {first}"
        if hydra := HYDRA.fullmatch(first):
            return f"'{first}' stands alone: an option is given as --{hydra[1]} {hydra[2]}"
        if args[0] in FROM_CHECKPOINT and not any(arg.startswith("--ckpt_path") for arg in args):
            return f"'{first}' stands alone: a run is given as --ckpt_path {first}"
        return f"'{first}' stands alone: an option is given as --name value, several values as [a,b]"
    shown = first.partition("=")[0]
    if shown not in (arg.partition("=")[0] for arg in args):  # of a class within the config
        whole = whole_key(shown.lstrip("-"), None, args)
        return f"unknown option --{whole}: --{whole.partition('.')[0]}.help tells what there is"
    if len(shown) == 2:
        return f"unknown option {shown}: --help tells what there is"
    return f"unknown option {shown}{_instead(shown.lstrip('-').replace('-', '_'), keys, '--')}"


def _unknown_key(key: str, keys: Iterable[str], args: Sequence[str]) -> str:
    place = place_of(key, args)
    return f"{f'{place}: ' if place else ''}unknown key {key}{_instead(key, keys, '')}"


def _instead(name: str, keys: Iterable[str], dashes: str) -> str:
    """What to write for a name that means nothing: what it is called here, or what is near."""
    keys = [key for key in keys if not key.endswith("+")]
    last = name.rpartition(".")[2]
    if last in REMOVED:
        return f": {REMOVED[last]}"
    if (other := instead_of(last, keys, dashes)) is not None:
        return other
    group, first = name.rpartition(".")[0], name.partition(".")[0]
    beside = [key for key in keys if key.rpartition(".")[0] == group]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    within = [key for key in keys if key.startswith(f"{first}.")] if group else []
    found = _near(name, same, dashes) or _near(name, beside, dashes) or _near(name, within, dashes)
    if found or within:
        part = "lora" if group == "model.lora" else first
        return found or misspelt(last, keys, dashes) or f": --help {part} tells what there is"
    outer = _near(first, {key.partition(".")[0] for key in keys}, dashes) if group else ""
    return _near(name, keys, dashes) or outer or ": --help tells what there is"


def _near(name: str, keys: Iterable[str], dashes: str) -> str:
    """Names beside each other are compared by their last part, so that what they share does not count."""
    ends = {key.rpartition(".")[2]: key for key in keys}
    close = did_you_mean(name.rpartition(".")[2], ends)
    return re.sub(r"'(\w+)'", lambda end: f"'{dashes}{ends[end[1]]}'", close)


def _unfit(key: str, types: str, given: str, args: Sequence[str]) -> str:
    """A value that fits none of the types that a key takes, said without the types' Python names."""
    given = "null" if given == "None" else given.strip("'\"")
    key = whole_key(key, given, args)
    choices = list(dict.fromkeys(re.findall(r"'([^']+)'", re.sub(r"<class '[\w.]+'>", "", types))))
    classes = [name for name in re.findall(r"<class '(?:\w+\.)*(\w+)'>", types) if name != "NoneType"]
    classes += [kind for kind in ("list", "dict") if f"{kind}[" in types and kind not in classes]
    kinds = [name for name in classes if name.lower() not in TYPES]
    if key.endswith("precision"):
        choices = [choice for choice in choices if choice in PRECISIONS]
    wanted = (TYPES.get(name.lower(), f"a {name} (its class_path and init_args)") for name in classes)
    expected = " or ".join(filter(None, [", ".join(choices), *wanted]))
    if not expected and "Callable" in types:
        expected = "a class_path and its init_args"
    short = given if len(given) < 60 else f"{given[:60]}..."
    said = f"{_placed(key, args)}expected {expected or 'another value'}, got '{short}'"
    return said + (did_you_mean(given, choices) or meant_class(given, kinds))


def _placed(key: str, args: Sequence[str]) -> str:
    """The key, behind the file and line that say it, in front of what is wrong with it."""
    place = place_of(key, args)
    return f"{f'{place}: ' if place else ''}{key}: "


PRECISIONS = ("auto", "float32", "bf16-base", "nf4-base", "bf16-mixed", "16-mixed", "64-true")
"""Those that can train an adapter: Lightning's others round it too, or need a package that is not for adapters."""


def _no_function(key: str, path: str, kind: str) -> str:
    return (
        f"{key}: '{path}' is no subclass of {kind} and no function that says with '-> {kind}' that it returns one: name"
        f" a class, or annotate the function"
    )
