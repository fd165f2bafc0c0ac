"""The pages of docs/ are true: their YAML and commands are parsed, their Python runs, what they name is there."""

import ast
import inspect
import json
import re
import shlex
import sys
import tomllib

import loralib
import peft
import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

import lora_lightning
from lora_lightning import ChatData, LoRAConfig, load_loralib
from lora_lightning.cli.parser import command_parser
from lora_lightning.cli.registry import COMMANDS
from tests.chats import CHATML
from tests.command.process import REPOSITORY, command, ends
from tests.recipes.recipe import parse
from tests.tiny_lm import make_lm

PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((REPOSITORY / "docs").glob("*.md"))}
PAGES["README.md"] = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROJECT = REPOSITORY / "lora_lightning" / "template" / "project"
"""What new.md speaks of: files and targets of the projects that it makes."""
BASE = "demo.yaml"
"""What `run.yaml` and `mine.yaml` stand for."""


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.S | re.M)


def everywhere(language):
    return [pytest.param(page, b, id=f"{page}-{n}") for page in PAGES for n, b in enumerate(blocks(page, language))]


def run_python(page):
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), {"__name__": "page"})


# ---- what is parsed


def commands():
    """Lines that call the command in a block, fenced or indented, with their continuations."""
    called = r"^(lora-lightning|torchrun .* -m lora_lightning) (?=[a-z])"
    for page, text in PAGES.items():
        for number, whole in enumerate(re.sub(r"\s*\\\n\s*", " ", text).splitlines()):
            line = whole.split(" #")[0].strip()
            if re.match(called, line) and not re.search(r"help\b|--print_config", line):  # which end in a screen
                yield pytest.param(re.split(called, line)[-1].split(" > ")[0], id=f"{page}-{number}")


def overlays(args):
    """The files under `configs/` and the other arguments."""
    files, rest, words = [], [], iter(args)
    for word in words:
        if word in ("-c", "--config"):
            file = next(words)
            files.append(file.removeprefix("configs/") if file.startswith("configs/") else BASE)
        else:
            rest.append(word)
    return files or [BASE], rest


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_of_a_page_is_parsed(line):
    name, *args = shlex.split(line)
    if name in COMMANDS:
        given = command_parser(name).parse_args(args)
        args, name = (given.fit, "fit") if name == "plan" else ([], name)
    files, rest = overlays(args)
    if name == "fit":
        assert parse(files, *rest).data.class_path
    else:  # its parser is that of fit with options of its own
        assert name in COMMANDS or (name in {"test", "validate", "predict", "export"} and rest)


@pytest.mark.parametrize(("page", "block"), everywhere("yaml"))
def test_the_yaml_of_a_page_is_parsed(page, block, tmp_path, monkeypatch):
    """On the demo's; a whole config with its data by itself."""
    content = yaml.safe_load(block)
    whole = {"model", "data"} <= set(content)
    if not (
        set(content) <= {"trainer", "model"} or (whole and page in ("quick-start.md", "moving.md", "reference.md"))
    ):
        return  # of data with its task: the tests of tasks.md and your-own.md read them
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGES[page], re.S | re.M):
        (tmp_path / name).write_text(code)  # a file that the page has one write
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "page.yaml").write_text(block)
    assert parse([tmp_path / "page.yaml"] if whole else [BASE, tmp_path / "page.yaml"]).data.class_path


@pytest.mark.parametrize(("page", "block"), everywhere("python"))
def test_the_python_of_a_page_compiles(page, block):
    compile(block, page, "exec")


# ---- what is run


RUN = ("README.md", "idea.md", "backbones.md", "moving.md", "python.md", "big-models.md", "adapters.md")


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs(page):
    assert blocks(page, "python")
    run_python(page)


def test_the_loralib_lines_of_formats_run():
    """On a GPT-2 of random weights and a file of loralib's keys and shapes for query and value."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=40, n_positions=16))
    at = "transformer.h.{}.attn.c_attn.lora_{}"
    factors = {at.format(i, "A"): torch.randn(8, 24) for i in range(2)}
    torch.save(factors | {at.format(i, "B"): torch.randn(48, 4) for i in range(2)}, "gpt2_lora.pt")
    (code,) = blocks("formats.md", "python")
    plain = model(torch.arange(5)[None]).logits
    exec(compile(code, "formats.md", "exec"), {"model": model, "load_loralib": load_loralib})
    assert not torch.equal(model(torch.arange(5)[None]).logits, plain)


def lines_of(page):
    joined = (re.sub(r"\s*\\\n\s*", " ", block) for block in blocks(page, "bash"))
    lines = (line.split("#")[0].strip() for block in joined for line in block.splitlines())
    return [shlex.split(line)[1:] for line in lines if line.startswith("lora-lightning ")]


@pytest.mark.slow  # a fit of the demo's model for each command
def test_the_commands_of_quick_start_and_export_run_as_they_stand(tmp_path, monkeypatch):
    """On the page's own files, with its rows often enough to be split."""
    (rows,), (config,) = blocks("quick-start.md", "text"), blocks("quick-start.md", "yaml")
    head, *rest = rows.splitlines()
    (tmp_path / "mine.csv").write_text("\n".join([head, *rest * 10]) + "\n")
    (tmp_path / "mine.yaml").write_text(config)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    for page in ("quick-start.md", "export.md"):
        for args in lines_of(page):
            command(monkeypatch, *args)
        run_python(page)
    assert len((tmp_path / "runs/mine/version_0/predict/predictions.jsonl").read_text().splitlines()) == 12
    for made in ("runs/r16/version_0/config.yaml", "small/merged/config.json", "merged/config.json"):
        assert (tmp_path / made).is_file()


# ---- tasks.md

TASKS = re.findall(r"^```json\n(.*?)^```\n+```yaml\n(.*?)^```", PAGES["tasks.md"], flags=re.S | re.M)


def test_every_task_and_data_module_is_on_the_page_of_tasks_and_every_name_there_is_ours():
    page, ours = PAGES["tasks.md"], lora_lightning
    named = re.findall(r"lora_lightning\.(\w+)|`([A-Z]\w+(?:Data|Classification))`", page)
    assert [name for pair in named for name in pair if name and not hasattr(ours, name)] == []
    public = [n for n in ours.__all__ if n.endswith("Data") or hasattr(getattr(ours, n), "monitor")]
    assert [name for name in public if f"`{name}`" not in page and f"lora_lightning.{name}" not in page] == []


@pytest.mark.parametrize(("rows", "config"), TASKS, ids=[re.search(r"\.(\w+Data)", c)[1] for _, c in TASKS])
def test_rows_of_the_page_of_tasks_become_batches_and_its_config_is_parsed(rows, config, tmp_path, tiny):
    (tmp_path / "mine.jsonl").write_text(rows * 10)
    content = yaml.safe_load(config)
    data = content["data"]
    cls = getattr(lora_lightning, data["class_path"].rpartition(".")[2])
    causal = "CausalLM" in config or "Seq2Seq" in config
    own = {"path": "mine.jsonl", "tokenizer": str(make_lm(tmp_path / "lm")) if causal else tiny.bert, "batch_size": 4}
    module = cls(**data["init_args"] | own | ({"chat_template": CHATML} if cls is ChatData else {}))
    module.prepare_data()
    module.setup("fit")
    assert {"input_ids", "anchor"} & set(next(iter(module.train_dataloader())))
    assert len(list(module.val_dataloader())) > 0
    bare = {"pretrained_model_name_or_path": "x"} | content["model"].get("backbone", {}).get("init_args", {})
    content["model"]["backbone"] = {"class_path": "lora_lightning.huggingface", "init_args": bare}
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(content))
    assert parse([tmp_path / "page.yaml"]).data.class_path


# ---- your-own.md


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The page's files, and its command."""
    for block in (*blocks("your-own.md", "python"), *blocks("your-own.md", "yaml")):
        (tmp_path / block.partition("\n")[0].removeprefix("# ")).write_text(block)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "mine.yaml", "plain.py", "plain.yaml"]
    monkeypatch.setattr("sys.path", [*sys.path])

    def call(*args):
        for module in ("mine", "plain"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        command(monkeypatch, *args)

    return call


def test_ones_own_task_data_and_backbone_take_less_than_40_lines_and_learn(own, tmp_path):
    code, plain = blocks("your-own.md", "python")
    assert 20 < len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) < 40
    assert "lora_lightning" not in plain, "a plain module and a dataset need nothing of this package"
    for name, figure, low, high in (("mine", "val_mae", 0, 0.5), ("plain", "val_accuracy", 0.9, 1.01)):
        own("fit", "--config", f"{name}.yaml", "--trainer.enable_progress_bar", "false")
        report = json.loads((tmp_path / f"runs/{name}/version_0/report.json").read_text())
        assert low <= report[figure] < high
        assert report["w0_unchanged"]
    for name in ("test", "predict", "export"):
        own(name, "--ckpt_path", "runs/plain")


@pytest.mark.parametrize(("old", "new", "said"), [("mine.Regression", "mine.Regresion", 0), ("width", "widht", 1)])
def test_a_wrong_name_is_answered_as_the_page_says(old, new, said, own, tmp_path, monkeypatch, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(config.read_text().replace(old, new))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    line, _ = ends(monkeypatch, capsys, "fit", "--config", "mine.yaml")
    text = blocks("your-own.md", "text")[0].splitlines()
    assert [t for t in text if t.startswith("lora-lightning: error")][said] == f"lora-lightning: error: {line}"


# ---- moving.md: what it says of PEFT, loralib and transformers is what is installed; of ours, what we do


def test_defaults_of_peft_loralib_and_ours_are_those_of_moving():
    rows = [re.split(r" *\| *", line.strip("| ")) for line in PAGES["moving.md"].splitlines() if line.startswith("| ")]
    found = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows if len(row) == len(rows[0])}
    theirs, ours = peft.LoraConfig(), LoRAConfig()
    arguments = inspect.signature(loralib.Linear.__init__).parameters
    rank, alpha, dropout = (arguments[name].default for name in ("r", "lora_alpha", "lora_dropout"))
    for name, *wanted in (
        ("rank", theirs.r, f"{rank}, off", ours.r),
        ("alpha", theirs.lora_alpha, alpha, None),
        ("scale alpha / r", theirs.lora_alpha // theirs.r, None, f"{ours.scale(ours.r, ours.scaling_alpha):.0f}"),
        ("LoRA dropout", *(f"{value:.0f}" for value in (theirs.lora_dropout, dropout, ours.dropout))),
    ):
        for who, value in zip(("PEFT", "loralib", "here"), wanted, strict=True):
            assert value is None or found[name][who] == str(value), (name, who)


# ---- what the pages and the README name


def named(pattern):
    pages = {**PAGES, "CONTRIBUTING.md": (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")}
    return {(page, found) for page, text in pages.items() for found in re.findall(pattern, text)}


def test_every_target_of_make_module_extra_and_file_that_a_page_names_is_there():
    here, theirs = (
        re.findall(r"^([a-z-]+):", file.read_text(encoding="utf-8"), re.M)
        for file in (REPOSITORY / "Makefile", PROJECT / "Makefile.jinja")
    )
    targets = named(r"(?m)(?:^|`)make ([a-z-]+)")
    assert [t for page, t in targets if t not in here and not (page == "new.md" and t in theirs)] == []
    modules = [REPOSITORY / name.replace(".", "/") for _, name in named(r"python -m ((?:benchmarks|tests)\.\w+)")]
    assert [m for m in modules if not (m.with_suffix(".py").is_file() or (m / "__main__.py").is_file())] == []
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {name for _, names in named(r"lora_lightning\[([\w,-]+)\]") for name in names.split(",")}
    assert wanted <= set(extras)
    files = named(r"`((?:configs|tests|benchmarks|requirements|docs)/[\w./-]+)`")
    assert [f for page, f in files if page != "new.md" and not (REPOSITORY / f).exists()] == []
    of_a_project = {path.name.removesuffix(".jinja") for path in PROJECT.rglob("*")} | {"offline.yaml"}
    assert [f for page, f in files if page == "new.md" and f.rpartition("/")[2] not in of_a_project] == []
    assert min(map(len, (targets, modules, wanted, files))) > 3


def test_every_test_that_a_page_names_is_there_and_each_of_ten_laws_has_its_own():
    def functions(file):
        return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}

    there = set().union(*(functions(file) for file in (REPOSITORY / "tests").rglob("test_*.py")))
    found = {name for page in ("guards.md", "laws.md") for name in re.findall(r"`(test_\w+)`", PAGES[page])}
    assert len(found) > 35
    assert found <= there, sorted(found - there)
    laws = re.findall(r"^## (\d+)\. .*?\n(.*?)(?=^## )", PAGES["laws.md"], re.S | re.M)
    assert [int(number) for number, _ in laws] == list(range(1, 11))
    for _, text in laws:
        files = re.findall(r"^- \[(tests/\S+\.py)\]\(\.\./(\S+)\):\n((?:  `\w+`,?\n)+)", text, re.M)
        assert len(files) >= 2
        for shown, file, names in files:
            assert shown == file
            assert set(re.findall(r"`(\w+)`", names)) <= functions(REPOSITORY / file), file


def test_every_error_that_troubleshooting_quotes_is_in_the_source():
    """With `…` for what is put in, and without backquotes, which would end a heading's code."""

    def texts(node):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        said = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts]
        return re.sub("…+", "…", "".join(said).replace("`", ""))

    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (REPOSITORY / "lora_lightning").rglob("*.py")]
    said = {texts(n) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.JoinedStr | ast.Constant)}
    quoted = re.findall(r"^### `(.*)`$", PAGES["troubleshooting.md"], re.M)
    assert len(set(quoted)) == len(quoted) > 35
    assert [quote for quote in quoted if not any(quote in text for text in said)] == []
