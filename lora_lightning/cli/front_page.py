"""The first screen, and a first word that is no command: before anything heavy is imported."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from lora_lightning.cli.exit_codes import CODES
from lora_lightning.cli.registry import ENTRIES, GROUPS
from lora_lightning.lora.errors import LoRAError, did_you_mean

ELSEWHERE = {
    **dict.fromkeys(("train", "finetune", "sft", "tune"), "fit"),
    **dict.fromkeys(("eval", "evaluate"), "test"),
    **dict.fromkeys(("generate", "infer", "inference"), "predict"),
}
"""What other tools call a command."""

GONE = {"completion": "bash completes commands and files by one line of ~/.bashrc, which docs/command.md has"}
"""Commands of earlier versions, and what to take."""

EXAMPLES = """\
examples
  lora-lightning fit -c configs/demo.yaml --model.lora.r 16 --name wider
  lora-lightning test --ckpt_path runs/wider
  lora-lightning export --ckpt_path runs/wider --formats adapter"""

OPTIONS = """\
options
  -h, --help    this screen; lora-lightning COMMAND --help tells of a command
  --version     of this package
  --debug       with any command: show the traceback of what goes wrong (LORA_LIGHTNING_DEBUG=1 does the same)"""


def front_page() -> str:
    """Every command with a line, examples, and what the exit codes mean."""
    parts = [
        "usage: lora-lightning COMMAND [options]",
        "LoRA fine-tuning on PyTorch Lightning: a YAML file describes a run.",
    ]
    for title, commands in GROUPS.items():
        parts.append("\n".join([title, *(f"  {name:<12}{command.line}" for name, command in commands.items())]))
    codes = [f"  {code:<5}{meaning}" for code, meaning in CODES.items()]
    return "\n\n".join([*parts, EXAMPLES, OPTIONS, "\n".join(["exit codes", *codes])])


def answered(args: list[str]) -> bool:
    """Whether the arguments ask for no command, and have been answered here.

    Raises:
        LoRAError: the first word is no command.
        SystemExit: with 2 where there are no arguments at all.
    """
    if not args:
        print(front_page(), file=sys.stderr)
        sys.exit(2)
    first = args[0]
    if first in ("-h", "--help", "help") and not args[1:]:
        print(front_page())
        return True
    if first in ("--version", "-V"):
        print(f"lora_lightning {version('lora_lightning')}")
        return True
    refuse_no_command(args)
    return False


def refuse_no_command(args: list[str]) -> None:
    """As `answered` raises."""
    first = args[0]
    if first in ENTRIES:
        return
    if first in GONE:
        raise LoRAError(f"'{first}' is no command any more: {GONE[first]}")
    named = next((arg for arg in args if arg in ENTRIES), None)
    if Path(first).suffix in (".yaml", ".yml"):
        raise LoRAError(f"a command comes first: lora-lightning {named or 'fit'} -c {first}")
    if first.startswith("-"):
        rest = " ".join(arg for arg in args if arg != named)
        raise LoRAError(f"a command comes first: lora-lightning {named or 'fit'} {rest}")
    meant = f": here it is '{ELSEWHERE[first]}'" if first in ELSEWHERE else did_you_mean(first, ENTRIES)
    raise LoRAError(f"no command '{first}'{meant} (there are {', '.join(ENTRIES)})")


def reordered(args: list[str]) -> list[str]:
    """`help fit` and `--help fit` as `fit --help`."""
    if args[1:] and args[0] in ("-h", "--help", "help"):
        return [args[1], "--help", *args[2:]]
    return args
