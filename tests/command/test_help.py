"""What a person reads: the first screen, and a command's own; and what they do not import."""

import contextlib
import re
import subprocess
import sys

import pytest

from lora_lightning.cli.parser import command_parser
from lora_lightning.cli.registry import COMMANDS, ENTRIES, FROM_CHECKPOINT, function_of
from tests.command.process import REPOSITORY, called, command


def screen(monkeypatch, capsys, *args):
    """What is printed, whatever the exit code."""
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        command(monkeypatch, *args)
    return capsys.readouterr().out


def test_the_first_screen_has_a_line_for_each_command_and_fits(monkeypatch, capsys):
    page = screen(monkeypatch, capsys, "--help")
    assert page == screen(monkeypatch, capsys, "help") == screen(monkeypatch, capsys, "-h")
    assert screen(monkeypatch, capsys, "help", "doctor") == screen(monkeypatch, capsys, "doctor", "--help")
    assert called(monkeypatch, capsys) == (2, page), "no arguments show it too, and are a mistake"
    assert re.fullmatch(r"lora_lightning \d+\.\d+.*\n", screen(monkeypatch, capsys, "--version"))
    for name, entry in ENTRIES.items():
        assert f"  {name:<12}{entry.line}\n" in page
    assert len(page.splitlines()) < 45
    assert max(map(len, page.splitlines())) <= 110


@pytest.mark.parametrize("name", ["fit", *FROM_CHECKPOINT])
def test_the_screen_of_a_command_fits_what_a_person_reads(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    lines = screen(monkeypatch, capsys, name, "--help").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 110
    assert any("--help all" in line for line in lines[:6]), "where all is told stands at the top"
    assert any(line.startswith("  --model.lora.r ") and line.endswith("(8)") for line in lines)


def test_all_that_is_told_of_a_group(monkeypatch, capsys):
    page = screen(monkeypatch, capsys, "fit", "--help", "lora")
    assert "--model.lora.rank_pattern" in page
    assert "longest pattern that matches" in " ".join(page.split())
    assert "--trainer.max_epochs" not in page
    trainer = screen(monkeypatch, capsys, "fit", "--help", "trainer")
    assert "--trainer.benchmark" in trainer
    for internal in ("AdapterCheckpoints", "ContinuedCSVLogger"):
        assert internal not in "".join(trainer.split())
    assert "lora_lightning.FSDP2Strategy" in "".join(trainer.split())
    page = screen(monkeypatch, capsys, "fit", "--help", "all")
    for option in ("--trainer.benchmark", "--model.lora.slices", "--data.help", "--save_every"):
        assert option in page
    first = screen(monkeypatch, capsys, "export", "--help").splitlines()[:40]
    assert first[0].endswith("export --ckpt_path RUN [-c CONFIG ...] [options]")
    for option in ("--ckpt_path", "--output_dir", "--formats", "--dtype", "--max_shard_size", "--serving"):
        assert any(line.strip().startswith(option) for line in first), "a command's own come first"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_option_of_a_small_command_is_told_of_with_its_default(name, monkeypatch, capsys):
    page = " ".join(screen(monkeypatch, capsys, name, "--help").split())
    assert callable(function_of(name))
    for action in command_parser(name).options():
        assert action.help, f"{name} {action.dest} has no docstring"
        shown_as = action.option_strings or [action.metavar or action.dest]
        assert shown_as[-1] in page


HEAVY = {"torch", "lightning", "jsonargparse", "datasets", "transformers.modeling_utils", "copier"}


@pytest.mark.parametrize(
    ("args", "loaded"),
    [
        (["--help"], "[]"),
        (["-c", "run.yaml"], "[]"),
        (["new", "--help"], "['jsonargparse']"),
        (["doctor", "--fit", "false"], "['jsonargparse', 'lightning', 'torch']"),
    ],
)
def test_a_command_imports_no_more_than_it_needs(args, loaded):
    """A screen loads nothing heavy, and what reads no data neither datasets nor transformers' models."""
    code = (
        "import sys; from lora_lightning.__main__ import main; sys.argv = ['lora-lightning', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == loaded
