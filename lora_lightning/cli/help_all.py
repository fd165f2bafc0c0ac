"""All that is told of a command: jsonargparse's own screen, put into an order and rid of what no one reads."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from lora_lightning.cli.registry import FROM_CHECKPOINT

KNOWN = re.compile(r",\s+known\s+subclasses:([^()]*)(?=\)\n)")


def has_groups(parser: Any) -> bool:
    """Whether it is of a command over a whole config."""
    return any(action.dest == "model.lora.r" for action in parser._actions)


def usage(parser: Any) -> str:
    """Without the hundred flags."""
    prog = parser.prog.replace(" [options]", "").replace("__main__.py", "lora-lightning")
    name = prog.rpartition(" ")[2]
    if has_groups(parser):
        wants = "--ckpt_path RUN [-c CONFIG ...]" if name in FROM_CHECKPOINT else "-c CONFIG [-c CONFIG ...]"
        return f"usage: {prog} {wants} [options]"
    wanted = []
    for action in parser._actions:
        if not action.option_strings:
            one = action.dest.upper().removesuffix("S")
            wanted.append(f"{one} [{one} ...]" if action.nargs == "+" else action.dest.upper())
        elif action.dest in parser.needed:
            wanted.append(f"{action.option_strings[-1]} {action.dest.upper()}")
    return " ".join([f"usage: {prog}", *wanted, "[options]"])


def whole(parser: Any, text: str) -> str:
    """jsonargparse's own screen, the command's options first, without the names of every nn.Module that is loaded."""
    _, _, rest = text.partition("\n\n")
    sections = _own_first(rest) if has_groups(parser) else _of_a_function(rest, str(parser.description))
    return f"{usage(parser)}\n\n{KNOWN.sub(_shorter, sections)}"


def _of_a_function(sections: str, description: str) -> str:
    """jsonargparse gives a function's options the function's own line as their title; `--help` goes last."""
    described, *parts = sections.rstrip().split("\n\n")
    last = [part.partition("\n")[2] for part in parts if part.startswith("options:\n")]
    kept = [part for part in parts if not part.startswith("options:\n")]
    kept = [re.sub(rf"^{re.escape(description.rstrip('.'))}[.:]*\n", "options:\n", part) for part in kept]
    return "\n\n".join([described, *kept]) + "\n" + "\n".join(last) + "\n"


def _shorter(listed: re.Match[str]) -> str:
    """A list of known subclasses that a person can take in, without the parts that ours are made of; or nothing."""
    names = re.sub(r"\s+", "", listed[1]).split(",")
    public = [name for name in names if not re.match(r"lora_lightning(\.\w+){2,}$|accelerate\.|transformers\.", name)]
    if len(public) > 30:
        return ""
    filled = textwrap.fill(", ".join(public), 54, break_long_words=False)
    return ", known subclasses:\n" + textwrap.indent(filled, " " * 24)


def _own_first(sections: str) -> str:
    """A command's own options in front of those that it shares with all others, which fill ten screens."""
    parts = sections.split("\n\n")
    starts = [part.partition("\n")[0] for part in parts]
    if "Linked arguments:" in starts[:-1] and "options:" in starts:
        _, _, own = parts.pop().partition("\n")
        parts.insert(starts.index("options:"), f"options of this command:\n{own.rstrip()}")
    return "\n\n".join(parts).rstrip() + "\n"
