"""`lora-lightning new`: a project of one's own. copier renders `template/`; what is asked stands in its copier.yml.

Nothing heavy is imported here: the command is done in a second or two.
"""

from __future__ import annotations

import keyword
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lora_lightning.lora.errors import LoRAError, MissingPackageError, did_you_mean
from lora_lightning.template_origin import origin

TEMPLATE = Path(__file__).with_name("template")
ANSWERS = ".copier-answers.yml"
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
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

    On a terminal it asks for what no flag says; with --defaults, or without a terminal, it takes the defaults.

    Args:
        folder: a new or empty folder, by whose name the project is called.
        task: text-classification, regression, multi-label, token-classification, seq2seq, causal-lm, chat, preference,
            embedding, image-classification, segmentation, or own for anything else. The first by default.
        backbone: a name on the hub, a directory, `package:NAME/path`, `timm:NAME`, `torchvision:NAME`, a class path, or
            `own` for a tiny one of the project's own, which needs no network. Each task has its default.
        logger: none, wandb, tensorboard or mlflow, beside the CSV log and the page that each run leaves.
        license: none, MIT, Apache-2.0 or BSD-3-Clause.
        author: who holds the copyright; git's user.name by default.
        package: what pip is to install lora_lightning from, in place of a range of versions: a folder, a wheel, an URL
            such as git+https://..., or versions such as ==0.1.0. The environment variable LORA_LIGHTNING_PACKAGE says
            the same.
        template: another template than this package's own: a folder or an URL that copier takes.
        template_ref: of it, a tag, branch or commit; the newest tag by default.
        git: make a git repository of it, with a first commit.
        defaults: ask nothing.
    """
    asking = not defaults and sys.stdin.isatty() and sys.stdout.isatty()
    target = Path(folder if folder is not None else _asked_name(asking))
    name = checked_name(target.resolve().name)
    refuse_occupied(target)
    answers = {"task": task, "backbone": backbone, "logger": logger, "license": license, "author": author}
    answers = {key: value for key, value in answers.items() if value is not None}
    check_choices(answers)
    given = package or os.environ.get(PACKAGE)
    data = {**answers, "project": name, "requirement": requirement(given), "year": _year()}
    if "author" not in data and (user := _git("config", "user.name")):
        data["author"] = user
    rendered = render(target, data, template, template_ref, asking=asking)
    committed = git and start_repository(target)
    print(_told(target, rendered, committed=committed))


def checked_name(name: str) -> str:
    """The name, where a distribution, a folder and (with _ for -) a Python package can be called so.

    Raises:
        LoRAError: they cannot, with a name that they can.
    """
    module = name.replace("-", "_")
    if not NAME.fullmatch(name):
        raise LoRAError(
            f"a project's name is lower-case letters and digits, joined by _ or -, got '{name}': try '{_mended(name)}'"
        )
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module in ("tests", "configs", "data"):
        raise LoRAError(f"'{name}' means something else in Python or in the project: try '{name}_project'")
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != Path.cwd()]
    found = PathFinder.find_spec(module, elsewhere)
    if found is not None and found.origin is not None:
        raise LoRAError(f"'{name}' would hide the installed package '{module}': try '{name}_project'")
    return name


def _mended(name: str) -> str:
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    mended = "_".join(words) or "my_project"
    return mended if mended[0].isalpha() else f"project_{mended}"


def refuse_occupied(target: Path) -> None:
    """Raise where anything is in the way; a folder may be there if it is empty.

    Raises:
        LoRAError: it is a file, or holds something.
    """
    if target.is_file() or target.is_symlink():
        raise LoRAError(f"'{target}' is there already and no folder: name a new one")
    if target.is_dir() and any(target.iterdir()):
        raise LoRAError(f"'{target}' is not empty, and nothing was written: name a new folder")


def questions() -> dict[str, Any]:
    """The template's questions by name, as its copier.yml has them."""
    read = yaml.safe_load((TEMPLATE / "copier.yml").read_text(encoding="utf-8"))
    return {name: entry for name, entry in read.items() if not name.startswith("_")}


def check_choices(answers: dict[str, str]) -> None:
    """Raise where an answer is none of its question's choices.

    Raises:
        LoRAError: it is not, with the nearest.
    """
    asked = questions()
    for name, value in answers.items():
        known = list(asked[name].get("choices", {}).values())
        if known and value not in known:
            raise LoRAError(f"--{name} is one of {', '.join(known)}, got '{value}'{did_you_mean(value, known)}")


def requirement(package: str | None) -> str:
    """What a project asks pip for.

    Args:
        package: a folder or a file, an URL, versions such as `==0.1.0`; None for a range of versions.

    Raises:
        LoRAError: it is none of these.
    """
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


def render(
    target: Path, data: dict[str, Any], template: str | None, ref: str | None, *, asking: bool
) -> dict[str, Any]:
    """Let copier do it; what it began is taken away where it fails.

    Returns:
        All answers, given, asked or taken by default.

    Raises:
        MissingPackageError: copier is not installed.
        LoRAError: copier refuses, or is stopped.
    """
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
    if template is None:
        _note_origin(target / ANSWERS)
    return dict(done.answers.combined)


def _note_origin(file: Path) -> None:
    """Where `copier update` is to find this template: not in the folder that the package happens to be installed in."""
    head, _, _ = file.read_text(encoding="utf-8").partition("\n")
    answers = yaml.safe_load(file.read_text(encoding="utf-8"))
    answers.pop("_src_path", None)
    answers = {**origin(TEMPLATE), **answers}
    file.write_text(f"{head}\n{yaml.safe_dump(answers, allow_unicode=True)}", encoding="utf-8")


def start_repository(target: Path) -> bool:
    """A git repository with a first commit; what a person has not set up for git is left to them.

    Returns:
        Whether there is a commit.
    """
    if _git("rev-parse", "--is-inside-work-tree", cwd=target) == "true":
        return False  # a project within a repository belongs to it
    if _git("init", "--quiet", "--initial-branch=main", cwd=target) is None:
        return False
    _git("add", "--all", cwd=target)
    return _git("commit", "--quiet", "--message", "Start from the template of lora_lightning", cwd=target) is not None


def _git(*args: str, cwd: Path | None = None) -> str | None:
    """What git says, or None where there is none or it fails."""
    try:
        done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _asked_name(asking: bool) -> str:
    if not asking:
        raise LoRAError("new needs a name: lora-lightning new my_project")
    try:
        return input("Name of the project, which is its folder too: ").strip()
    except (EOFError, KeyboardInterrupt):
        raise LoRAError("stopped, and nothing was written") from None


def _year() -> str:
    from datetime import date

    return str(date.today().year)


def _told(target: Path, answers: dict[str, Any], *, committed: bool) -> str:
    offline = "" if answers["backbone"] == "own" else f" on {answers['backbone']}"
    git = ", with a first commit" if committed else ""
    steps = [
        ("make test", "does all of it work? (no network; the first time, minutes to install)"),
        ("make fit", f"{answers['task']}{offline}, on made-up rows in data/"),
        ("make export", "a PEFT adapter and a merged model"),
    ]
    lines = [f"{target} is a project now{git}. README.md there says what to change.", f"  cd {target}"]
    return "\n".join([*lines, *(f"  {command:<13}{what}" for command, what in steps)])


def parser() -> ArgumentParser:
    """Of the command alone: that of the others needs Lightning, which takes seconds to import."""
    made = ArgumentParser(
        prog="lora-lightning new", description="Make a project of your own.", exit_on_error=False, allow_abbrev=False
    )
    made.add_argument("folder", nargs="?", type=str, help="A new or empty folder, by whose name the project is called.")
    made.add_function_arguments(new, skip={"folder"})
    return made


def _with_values(args: list[str]) -> Iterator[str]:
    """`--defaults` alone is `--defaults=true`, which is all that jsonargparse takes."""
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        yield "--defaults=true" if arg == "--defaults" and following not in ("true", "false") else arg


def main(args: list[str]) -> None:
    """Run the command.

    Raises:
        LoRAError, MissingPackageError: as `new` does, or an argument that there is not.
    """
    made = parser()
    try:
        given = made.parse_args([*_with_values(args)])
    except ArgumentError as error:
        known = [option for action in made._actions for option in action.option_strings]
        wrong = next((arg.split("=")[0] for arg in args if arg.startswith("--") and arg.split("=")[0] not in known), "")
        hint = did_you_mean(wrong, known) if wrong else ""
        raise LoRAError(f"{' '.join(str(error).split())}{hint} (see --help)") from error
    new(**given.as_dict())
