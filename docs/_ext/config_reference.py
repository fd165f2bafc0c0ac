"""The directive `config`: what a class or function of the package takes, read as the command's parser reads it.

    ```{config}
    lora_lightning.LoRAConfig
    ```

gives the docstring and each argument with its type, its default and its text: the same that `--help` shows. The option
`:without:` leaves out keys that begin so, which have a section of their own.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import yaml
from docstring_parser import parse as parse_docstring
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from jsonargparse import ArgumentParser, set_parsing_settings
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class Argument:
    """One key of a config."""

    key: str
    type: str
    default: str
    text: str


def found(path: str) -> Callable[..., Any]:
    """The class or function of that path."""
    module, _, name = path.rpartition(".")
    item: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return item


def arguments_of(item: Callable[..., Any]) -> Iterator[Argument]:
    """What the command's parser takes for it, in its order."""
    parser = ArgumentParser()
    add = parser.add_class_arguments if inspect.isclass(item) else parser.add_function_arguments
    add(item, None, fail_untyped=False, sub_configs=True)
    for action in parser._actions:
        if action.dest == "help" or action.dest.endswith(".help") or action.default == "==SUPPRESS==":
            continue
        kind = getattr(action, "_typehint", None) or action.type
        default = "required" if action.required else plain_value(action.default)
        yield Argument(action.dest, plain_type(kind), default, _sentence(action.help))


def plain_type(kind: Any) -> str:
    """A type as a person writes it: `list[str]`, `str or null`, one of the words."""
    text = kind.__name__ if inspect.isclass(kind) and not get_args(kind) else str(kind)
    text = re.sub(r"\bOptional\[(.*)\]$", r"\1 | None", re.sub(r"\b[a-z_]+\.(?=[\w.]*[A-Za-z])", "", text))
    text = re.sub(r"^Union\[(.*)\]$", lambda found: " | ".join(_split(found.group(1))), text)
    text = re.sub(r"Callable\[\[\w+\], (?:Union\[)?(\w+)[^|]*\]+", r"\1 by class_path", text)
    words = re.sub(r"Literal\[([^]]*)\]", lambda found: found.group(1).replace("'", "").replace(", ", " | "), text)
    return words.replace("NoneType", "null").replace("None", "null").replace(" | ", " or ")


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def plain_value(value: Any) -> str:
    """A default as YAML writes it."""
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, dict | list | str | int | float | None):
        return str(value)
    return str(yaml.safe_dump(value, default_flow_style=True, width=math.inf)).removesuffix("...\n").strip()


def _sentence(text: str | None) -> str:
    text = re.sub(r":[a-z:]+:`~?", "`", " ".join((text or "").split()))  # Lightning's docstrings: a role's text alone
    return text[:1].upper() + text[1:]


class Config(SphinxDirective):
    """Sections for the classes and functions that are named, one on a line."""

    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"without": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        return [node for path in self.content for node in self._one(path)]

    def _one(self, path: str) -> list[nodes.Node]:
        item, name = found(path), path.rpartition(".")[2]
        self.env.note_dependency(inspect.getfile(item))
        section = nodes.section(ids=[nodes.make_id(name)], names=[name])
        section += nodes.title("", "", nodes.literal("", name))
        docstring = parse_docstring(inspect.getdoc(item) or "")
        about = "\n\n".join(filter(None, [docstring.short_description, docstring.long_description]))
        section += self._parsed(about)
        listed = nodes.definition_list(classes=["config"])
        without = tuple(self.options.get("without", "").split())
        kept = [argument for argument in arguments_of(item) if not (without and argument.key.startswith(without))]
        listed += [self._entry(name, argument) for argument in kept]
        if len(listed):
            section += listed
        return [section]

    def _entry(self, name: str, argument: Argument) -> nodes.definition_list_item:
        term = nodes.term("", "", nodes.literal("", argument.key), ids=[nodes.make_id(f"{name}-{argument.key}")])
        term += [nodes.Text(" "), nodes.inline("", argument.type, classes=["kind"])]
        required = argument.default == "required"
        default = nodes.inline("", "required" if required else "default ", classes=["default"])
        if not required:
            default += nodes.literal("", argument.default)
        term += [nodes.Text(" "), default]
        definition = nodes.definition("", *self._parsed(argument.text))
        return nodes.definition_list_item("", term, definition)

    def _parsed(self, text: str) -> list[nodes.Node]:
        holder = nodes.container()
        self.state.nested_parse(StringList(textwrap.dedent(text).splitlines(), self.env.docname), 0, holder)
        return holder.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the directive known."""
    app.add_directive("config", Config)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
