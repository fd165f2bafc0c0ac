"""The README is true, and the page of recipes: their commands run, the tree is there."""

import re
import shlex
import subprocess

from lora_lightning.__main__ import main
from tests.command.process import REPOSITORY, run

README = (REPOSITORY / "README.md").read_text()
RECIPES_PAGE = (REPOSITORY / "docs" / "recipes.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README + RECIPES_PAGE, flags=re.S | re.M)


def lines(language):
    joined = (re.sub(r"\s*\\\n\s*", " ", block) for block in blocks(language))
    return [line.split("#")[0].strip() for block in joined for line in block.splitlines() if line.strip()]


RECIPES = [line for line in lines("bash") if re.search(r"-c configs/\w+/", line)]
"""Commands that stack recipes on models of the hub: test_docs.py has them parsed."""


def make(*args):
    return subprocess.run(["make", *args], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_make_has_the_targets_of_the_readme_with_a_line_each_and_ci_calls_make_test():
    shown = make("help")
    for target in re.findall(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), flags=re.M)[0].split():
        assert re.search(rf"make {target} +\w", shown), target
    for line in (line for line in lines("bash") if line.startswith("make ")):
        assert make("--dry-run", *shlex.split(line)[1:])
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text()
    assert len(README.splitlines()) <= 150, "one page"


def test_the_three_commands_of_the_readme_are_those_of_make_demo():
    shown = [" ".join(shlex.split(line)[1:]) for line in lines("bash") if line.startswith("lora-lightning")]
    recipe = make("--dry-run", "--always-make", "demo")
    demo = re.findall(r"lora-lightning (.*--config.*)", recipe)
    assert [" ".join(shlex.split(line)) for line in demo] == shown[:3]


def code_of(command):
    try:
        command()
    except SystemExit as ended:
        return ended.code
    return 0


TINY = """
model:
  backbone: {init_args: {pretrained_model_name_or_path: %(bert)s}}
data:
  init_args:
    {path: %(reviews)s, label_column: label, drop_labels: [], split: {group_by: film}, tokenizer: %(bert)s}
"""


def test_every_command_of_the_readme_runs(tiny, tmp_path, monkeypatch):
    """Cut short by the debug overlay; the demo's own on its model and texts, what may be made of it on a tiny one."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "tiny.yaml").write_text(TINY % {"bert": tiny.bert, "reviews": tiny.reviews})
    (tmp_path / "new.csv").write_text("text\na film to remember\nanother one to forget\n")
    run_lines = [line for line in lines("bash") if line.startswith("lora-lightning") and line not in RECIPES]
    for number, line in enumerate(run_lines):
        args = [arg.replace("runs/demo", "runs/debug") for arg in shlex.split(line)[1:]]
        if {"--config", "-c"} & {*args} and "--help" not in args:
            args += ["--config", "configs/debug.yaml", *(["--config", "tiny.yaml"] if number > 2 else [])]
        if "configs/strategy/ddp.yaml" in args or args[0] == "predict":
            # predict is of that run: its processes start the command anew
            run(*args, cwd=tmp_path)
            continue
        monkeypatch.setattr("sys.argv", ["lora-lightning", *args])
        assert not code_of(main), line
    assert (tmp_path / "runs/debug/report.json").is_file()
    assert (tmp_path / "my_project/configs").is_dir()
    assert len((tmp_path / "runs/debug-sweep/sweep.csv").read_text().splitlines()) == 3


def test_the_tree_of_the_readme_is_the_tree():
    """Each folder that it shows is there, and it shows each folder of the package."""
    tree = next(block for block in blocks("text") if block.startswith("lora_lightning/\n"))
    shown, above = set(), {}
    for line in tree.splitlines():
        name, depth = line.split()[0].rstrip("/"), (len(line) - len(line.lstrip())) // 2
        above[depth] = name
        shown.add("/".join(above[level] for level in range(depth + 1)))
    for path in shown:
        assert (REPOSITORY / path).is_dir(), path
    package = REPOSITORY / "lora_lightning"
    folders = [p for top in (package, package / "lora") for p in top.iterdir() if (p / "__init__.py").is_file()]
    assert {str(p.relative_to(REPOSITORY)) for p in folders} <= shown
    for link in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (REPOSITORY / link).exists(), link
