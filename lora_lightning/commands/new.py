"""`lora-lightning new` makes a project: copier renders `template/`, whose copier.yml has the questions.

Nothing heavy is imported here: the command takes a second or two.
"""

from __future__ import annotations

import os
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

from lora_lightning.commands.projects.checks import check_choices, check_name, refuse_occupied, requirement
from lora_lightning.commands.projects.render import render
from lora_lightning.commands.projects.repository import git as run_git
from lora_lightning.commands.projects.repository import start_repository
from lora_lightning.lora.errors import LoRAError

PACKAGE = "LORA_LIGHTNING_PACKAGE"
"""Environment variable in place of `--package`."""


def new(
    folder: str | None = None,
    task: str | None = None,
    backbone: str | None = None,
    logger: str | None = None,
    license: str | None = None,
    author: str | None = None,
    package: str | None = None,
    template: str | None = None,
    template_ref: str | None = None,
    git: bool = True,
    defaults: bool = False,
) -> None:
    """Make a project of your own: configs, data, a backbone, a task, tests, CI.

    On a terminal it asks for what no flag sets; with --defaults, or without a terminal, it takes the defaults.

    Args:
        folder: a new or empty folder, whose name is the project's.
        task: text-classification, regression, multi-label, token-classification, seq2seq, causal-lm, chat, preference,
            embedding, image-classification, segmentation, or own for anything else. The first by default.
        backbone: a name on the hub, a directory, `package:NAME/path`, `timm:NAME`, `torchvision:NAME`, a class path, or
            `own` for a tiny one in the project, which needs no network. Each task has a default.
        logger: none, wandb, tensorboard or mlflow, beside the CSV log and the page of each run.
        license: none, MIT, Apache-2.0 or BSD-3-Clause.
        author: the copyright holder; git's user.name by default.
        package: where pip installs lora_lightning from, in place of a range of versions: a folder, a wheel, an URL
            such as git+https://..., or versions such as ==0.1.0. The environment variable LORA_LIGHTNING_PACKAGE does
            the same.
        template: a template in place of this package's: a folder or an URL that copier takes.
        template_ref: a tag, branch or commit of it; the newest tag by default.
        git: make a git repository of it, with a first commit.
        defaults: ask nothing.
    """
    asking = not defaults and sys.stdin.isatty() and sys.stdout.isatty()
    target = Path(folder if folder is not None else _ask_name(asking))
    name = check_name(target.resolve().name)
    refuse_occupied(target)
    options = {"task": task, "backbone": backbone, "logger": logger, "license": license, "author": author}
    answers = {key: value for key, value in options.items() if value is not None}
    check_choices(answers)
    source = package or os.environ.get(PACKAGE)
    data = {**answers, "project": name, "requirement": requirement(source), "year": str(date.today().year)}
    if "author" not in data and (user := run_git("config", "user.name")):
        data["author"] = user
    rendered = render(target, data, template, template_ref, asking=asking)
    committed = git and start_repository(target)
    print(_next_steps(target, rendered, committed=committed))


def _ask_name(asking: bool) -> str:
    if not asking:
        raise LoRAError("new needs a name: lora-lightning new my_project")
    try:
        return input("Name of the project, which is its folder too: ").strip()
    except (EOFError, KeyboardInterrupt):
        raise LoRAError("stopped, and nothing was written") from None


def _next_steps(target: Path, answers: dict[str, Any], *, committed: bool) -> str:
    offline = "" if answers["backbone"] == "own" else f" on {answers['backbone']}"
    git = ", with a first commit" if committed else ""
    steps = [
        ("make test", "does all of it work? (no network; the first time, minutes to install)"),
        ("make fit", f"{answers['task']}{offline}, on made-up rows in data/"),
        ("make export", "a PEFT adapter and a merged model"),
    ]
    lines = [
        f"{target} is a project now{git}. README.md there says what to change.",
        f"  cd {shlex.quote(str(target))}",
    ]
    return "\n".join([*lines, *(f"  {command:<13}{what}" for command, what in steps)])
