"""Every page of docs/: its YAML and its commands are parsed with each class and argument checked, its Python compiles.

The pages' longer Python is run by tests of its own (`test_docs_run`, `test_docs_big_models`, `test_your_own`,
`lora/test_bank`).
"""

import re
import shlex
import tomllib

import pytest
import yaml

from lora_lightning.cli.parser import command_parser, with_values
from lora_lightning.cli.registry import COMMANDS, function_of
from tests.command.process import REPOSITORY
from tests.recipes.recipe import parse

PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((REPOSITORY / "docs").glob("*.md"))}
PROJECT = REPOSITORY / "lora_lightning" / "template" / "project"
"""What new.md speaks of: files and targets of the projects that it makes."""
BASE = "demo.yaml"
"""What `run.yaml` and `mine.yaml` stand for."""


def blocks(language):
    found = (
        (page, block)
        for page, text in PAGES.items()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)
    )
    return [pytest.param(page, block, id=f"{page}-{number}") for number, (page, block) in enumerate(found)]


def commands():
    """Lines that call the command in a block, fenced or indented, with their continuations."""
    joined = {page: re.sub(r"\s*\\\n\s*", " ", text) for page, text in PAGES.items()}
    lines = (
        (page, line.split(" #")[0].split("    # ")[0].strip())
        for page, text in joined.items()
        for line in text.splitlines()
    )
    called = r"^(lora-lightning|torchrun .* -m lora_lightning) (?=[a-z])"
    found = [(page, re.split(called, line)[-1].split(" > ")[0]) for page, line in lines if re.match(called, line)]
    found = [(page, line) for page, line in found if not re.search(r"help\b|--print_config", line)]  # end in a screen
    return [pytest.param(line, id=f"{page}-{number}") for number, (page, line) in enumerate(found)]


def overlays(args):
    """The files under `configs/` and the other arguments."""
    files, rest = [], []
    words = iter(args)
    for word in words:
        if word in ("-c", "--config"):
            file = next(words)
            files.append(file.removeprefix("configs/") if file.startswith("configs/") else BASE)
        else:
            rest.append(word)
    return files, rest


@pytest.mark.parametrize("line", commands())
def test_a_command_of_a_page_is_parsed(line):
    name, *args = shlex.split(line)
    if name in COMMANDS:
        given = command_parser(name).parse_args(with_values(args, function_of(name).__annotations__))
        if name == "plan":
            files, rest = overlays(given.fit)
            assert parse(files or [BASE], *rest).data.class_path
        return
    files, rest = overlays(args)
    ours = [word.partition("=")[0] for word in rest if word.startswith("--")]
    if name == "fit":
        assert parse(files or [BASE], *rest).data.class_path
    else:  # its parser is that of fit with options of its own
        assert name in {"test", "validate", "predict", "export"}
        assert ours


def files_of(page):
    """The Python files that a page has one write: blocks with a file's name in their first line."""
    return dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGES[page], re.S | re.M))


@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_the_yaml_of_a_page_is_parsed(page, block, tmp_path, monkeypatch):
    content = yaml.safe_load(block)
    if not set(content) <= {"trainer", "model"}:
        return  # of data with its task: test_docs_tasks, test_docs_run and test_your_own read them
    for name, code in files_of(page).items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "page.yaml").write_text(block)
    assert parse([BASE, tmp_path / "page.yaml"]).data.class_path


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_the_python_of_a_page_compiles(page, block):
    compile(block, page, "exec")


def named(pattern):
    """What the pages and the README name, by page."""
    pages = {**PAGES, "README.md": (REPOSITORY / "README.md").read_text(encoding="utf-8")}
    return {(page, found) for page, text in pages.items() for found in re.findall(pattern, text)}


def test_every_target_of_make_that_a_page_names_is_there():
    there = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M)
    found = named(r"(?m)(?:^|`)make ([a-z-]+)")
    assert len(found) > 3
    theirs = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile.jinja").read_text(encoding="utf-8"), re.M)
    there = {page: [*there, *theirs] if page == "new.md" else there for page, _ in found}
    assert [(page, target) for page, target in found if target not in there[page]] == []


def test_every_module_that_a_page_runs_is_there():
    found = named(r"python -m ((?:benchmarks|tests)\.\w+)")
    assert len(found) > 5
    files = {name: REPOSITORY / name.replace(".", "/") for _, name in found}
    missing = [n for n, at in files.items() if not (at.with_suffix(".py").is_file() or (at / "__main__.py").is_file())]
    assert missing == []


def test_every_extra_that_a_page_names_is_there():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = named(r"lora_lightning\[([\w,-]+)\]")
    assert len(found) > 3
    assert [name for _, names in found for name in names.split(",") if name not in extras] == []


def test_every_file_that_a_page_names_is_there():
    found = named(r"`((?:configs|tests|benchmarks|requirements|docs)/[\w./-]+)`")
    assert len(found) > 20
    assert [name for name in found if name[0] != "new.md" and not (REPOSITORY / name[1]).exists()] == []
    of_a_project = {path.name.removesuffix(".jinja") for path in PROJECT.rglob("*")}
    of_a_project |= {"offline.yaml"}  # named by an answer
    assert [name for page, name in found if page == "new.md" and name.rpartition("/")[2] not in of_a_project] == []
