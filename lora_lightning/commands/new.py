"""`lora-lightning new` makes a project: copier renders `template/`, whose copier.yml has the questions.

Nothing heavy is imported here: the command takes a second or two.
"""

from __future__ import annotations

import keyword
import os
import re
import shlex
import sys
from datetime import date
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.commands.package_origin import git as run_git
from lora_lightning.commands.package_origin import installable, template_origin
from lora_lightning.lora.errors import LoRAError, MissingPackageError, did_you_mean

PACKAGE = "LORA_LIGHTNING_PACKAGE"
"""Environment variable in place of `--package`."""
TEMPLATE = Path(__file__).parents[1] / "template"
ANSWERS = ".copier-answers.yml"
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
TAKEN = ("tests", "configs", "data")
"""Folders that a project has beside its package."""


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
    name = target.resolve().name
    _check_name(name)
    if target.is_symlink() or any(path.is_file() for path in (target, *target.parents)):
        raise LoRAError(f"'{target}' cannot be a folder, for a file or a link is there: name a new one")
    if target.is_dir() and any(target.iterdir()):
        raise LoRAError(f"'{target}' is not empty, and nothing was written: name a new folder")
    if template is None and template_ref is not None:
        raise LoRAError(f"template_ref '{template_ref}' is a version of another template: name that with --template")
    options = {"task": task, "backbone": backbone, "logger": logger, "license": license}
    options["author"] = author or run_git("config", "user.name")
    answers = {key: value for key, value in options.items() if value}
    _check_choices(answers)
    source = requirement(package or os.environ.get(PACKAGE))
    answers |= {"project": name, "requirement": source, "year": str(date.today().year)}
    rendered = _render(target, answers, template, template_ref, asking=asking)
    committed = git and _start_repository(target)
    print(_next_steps(target, rendered, committed=committed))


def _ask_name(asking: bool) -> str:
    if not asking:
        raise LoRAError("new needs a name: lora-lightning new my_project")
    try:
        return input("Name of the project, which is its folder too: ").strip()
    except (EOFError, KeyboardInterrupt):
        raise LoRAError("stopped, and nothing was written") from None


def _check_name(name: str) -> None:
    """Raise where a name cannot be that of a distribution, a folder and (with _ for -) a Python package."""
    module = name.replace("-", "_")
    if not NAME.fullmatch(name):
        words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
        mended = "_".join(words) or "my_project"
        mended = mended if mended[0].isalpha() else f"project_{mended}"
        raise LoRAError(
            f"a project's name is lower-case letters and digits, joined by _ or -, got '{name}': try '{mended}'"
        )
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != Path.cwd()]
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module in TAKEN:
        reason = "means something else in Python or in the project"
    elif (spec := PathFinder.find_spec(module, elsewhere)) is not None and spec.origin is not None:
        reason = f"would hide the installed package '{module}'"
    else:
        return
    raise LoRAError(f"'{name}' {reason}: try '{name}_project'")


def questions() -> dict[str, Any]:
    """The template's questions by name, as its copier.yml has them."""
    read = yaml.safe_load((TEMPLATE / "copier.yml").read_text(encoding="utf-8"))
    return {name: entry for name, entry in read.items() if not name.startswith("_")}


def _check_choices(answers: dict[str, str]) -> None:
    """Raise for an answer that is none of its question's choices."""
    by_name = questions()
    for name, value in answers.items():
        known = list(by_name[name].get("choices", {}).values())
        if known and value not in known:
            raise LoRAError(f"--{name} is one of {', '.join(known)}, got '{value}'{did_you_mean(value, known)}")


def requirement(package: str | None) -> str:
    """The requirement by which a project installs this package.

    Args:
        package: a folder or a file, an URL, versions such as `==0.1.0`; None for where this package was installed
            from, or a range of versions where that was an index.

    Raises:
        LoRAError: it is none of these.
    """
    package = package or installable()
    if package is None:
        return str(questions()["requirement"]["default"])
    if "://" in package:
        return f"lora_lightning @ {package}"
    versions = re.sub(r"^lora[-_]lightning", "", package).strip()
    if re.fullmatch(r"(==|>=|<=|~=|<|>|!=)[^\"]+", versions):
        return f"lora_lightning{versions}"
    if Path(package).exists():
        return f"lora_lightning @ {Path(package).resolve().as_uri()}"
    raise LoRAError(f"--package is a folder, a wheel, an URL or versions such as ==0.1.0; there is no '{package}'")


def _render(
    target: Path, data: dict[str, Any], template: str | None, ref: str | None, *, asking: bool
) -> dict[str, Any]:
    """Render by copier, which removes a folder that it made where it fails; returns all answers, defaults included."""
    try:
        import copier
        from copier.errors import CopierAnswersInterrupt, UserMessageError
    except ImportError as error:
        raise MissingPackageError("new needs copier: pip install 'lora_lightning[new]'") from error
    source = template or str(TEMPLATE)
    try:
        done = copier.run_copy(source, target, data, vcs_ref=ref, defaults=not asking, quiet=True)
    except (CopierAnswersInterrupt, KeyboardInterrupt):
        raise LoRAError("stopped, and nothing was written") from None
    except (UserMessageError, ValueError) as error:
        raise LoRAError(f"the template '{source}': {error}") from error
    if template is None:  # write where `copier update` finds it, in place of the installed package's folder
        file = target / ANSWERS
        comment, _, written = file.read_text(encoding="utf-8").partition("\n")
        answers = yaml.safe_load(written)
        answers.pop("_src_path", None)
        text = yaml.safe_dump({**template_origin(TEMPLATE), **answers}, allow_unicode=True)
        file.write_text(f"{comment}\n{text}", encoding="utf-8")
    return dict(done.answers.combined)


def _start_repository(target: Path) -> bool:
    """Make a git repository, and return whether it has a first commit, for which the user's git must be set up."""
    if run_git("rev-parse", "--is-inside-work-tree", cwd=target) == "true":
        return False  # the project is part of an existing repository
    if run_git("init", "--quiet", "--initial-branch=main", cwd=target) is None:
        return False
    run_git("add", "--all", cwd=target)
    message = "Start from the template of lora_lightning"
    return run_git("commit", "--quiet", "--message", message, cwd=target) is not None


def _next_steps(target: Path, answers: dict[str, Any], *, committed: bool) -> str:
    git = ", with a first commit" if committed else ""
    if not answers.keys() >= {"task", "backbone"}:  # a template with other questions
        return f"{target} is a project now{git}."
    backbone = "" if answers["backbone"] == "own" else f" on {answers['backbone']}"
    return f"""\
{target} is a project now{git}. README.md there says what to change.
  cd {shlex.quote(str(target))}
  make test    does all of it work? (no network; the first time, minutes to install)
  make fit     {answers["task"]}{backbone}, on made-up rows in data/
  make export  a PEFT adapter and a merged model"""
