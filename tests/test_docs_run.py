"""The code of the pages runs, one block after the other; the commands of the first run do, as they stand."""

import re
import shlex

import pytest
import torch
import yaml

from tests.command.process import REPOSITORY, command
from tests.recipes.recipe import parse

DOCS = REPOSITORY / "docs"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)


def run_python(page):
    names = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", ["idea.md", "backbones.md", "moving.md", "python.md"])
def test_the_python_of_a_page_runs(page, tmp_path):
    assert len(blocks(page, "python")) >= 2
    run_python(page)


def test_the_loralib_lines_of_formats_run(tmp_path):
    """On a GPT-2 of random weights and a file of loralib's keys and shapes for query and value."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from lora_lightning import load_loralib

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=40, n_positions=16))
    at = "transformer.h.{}.attn.c_attn.lora_{}"
    factors = {at.format(i, "A"): torch.randn(8, 24) for i in range(2)}
    torch.save(factors | {at.format(i, "B"): torch.randn(48, 4) for i in range(2)}, "gpt2_lora.pt")
    (code,) = blocks("formats.md", "python")
    plain = model(torch.arange(5)[None]).logits
    exec(compile(code, "formats.md", "exec"), {"model": model, "load_loralib": load_loralib})
    assert not torch.equal(model(torch.arange(5)[None]).logits, plain)


WHOLE = [
    (page, number, block)
    for page in ("quick-start.md", "moving.md", "reference.md")
    for number, block in enumerate(blocks(page, "yaml"))
    if {"model", "data"} <= set(yaml.safe_load(block))
]


@pytest.mark.parametrize(("page", "number", "block"), WHOLE, ids=lambda part: str(part)[:20].split("\n")[0])
def test_a_whole_config_of_a_page_is_parsed_by_itself(page, number, block, tmp_path):
    (tmp_path / "page.yaml").write_text(block)
    config = parse([tmp_path / "page.yaml"])
    assert config.model.lora.r >= 8
    assert config.data.class_path


def test_every_page_of_whole_configs_has_one():
    assert {page for page, *_ in WHOLE} == {"quick-start.md", "moving.md", "reference.md"}


def write_quick_start(folder):
    """The files that the page has one write, with its rows often enough to be split."""
    (rows,), (config,) = blocks("quick-start.md", "text"), blocks("quick-start.md", "yaml")
    head, *rest = rows.splitlines()
    (folder / "mine.csv").write_text("\n".join([head, *rest * 10]) + "\n")
    (folder / "mine.yaml").write_text(config)
    (folder / "configs").symlink_to(REPOSITORY / "configs")


def lines_of(page):
    joined = (re.sub(r"\s*\\\n\s*", " ", block) for block in blocks(page, "bash"))
    lines = (line.split("#")[0].strip() for block in joined for line in block.splitlines())
    return [shlex.split(line)[1:] for line in lines if line.startswith("lora-lightning ")]


@pytest.mark.slow  # a fit of the demo's model for each command
def test_the_commands_of_quick_start_and_export_run_as_they_stand(tmp_path, monkeypatch):
    write_quick_start(tmp_path)
    for args in lines_of("quick-start.md"):
        command(monkeypatch, *args)
    run_python("quick-start.md")
    run = tmp_path / "runs/mine/version_0"
    assert len((run / "predict/predictions.jsonl").read_text().splitlines()) == 12
    assert (tmp_path / "runs/r16/version_0/config.yaml").is_file()
    for args in lines_of("export.md"):
        command(monkeypatch, *args)
    assert (tmp_path / "small/merged/config.json").is_file()
    assert (tmp_path / "merged/config.json").is_file()
    run_python("export.md")
