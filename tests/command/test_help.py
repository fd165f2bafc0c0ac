"""What a person reads: the first screen, and a command's own; and what they do not import."""

import contextlib
import re
import subprocess
import sys

import pytest

from lora_lightning.cli.parser import command_parser
from lora_lightning.cli.registry import COMMANDS, ENTRIES, FROM_CHECKPOINT, function_of
from tests.command.process import REPOSITORY, command


def shown(monkeypatch, capsys, *args):
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        command(monkeypatch, *args)
    return capsys.readouterr().out


@pytest.fixture(params=[80, 120])
def columns(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def test_the_first_screen_has_a_line_for_each_command_and_fits(monkeypatch, capsys):
    page = shown(monkeypatch, capsys, "--help")
    for name, entry in ENTRIES.items():
        assert f"  {name:<12}{entry.line}\n" in page
    assert len(page.splitlines()) < 45
    assert max(map(len, page.splitlines())) <= 110


def test_the_first_screen_is_what_help_says_too(monkeypatch, capsys):
    assert shown(monkeypatch, capsys, "help") == shown(monkeypatch, capsys, "-h")
    assert shown(monkeypatch, capsys, "help", "doctor") == shown(monkeypatch, capsys, "doctor", "--help")


def test_no_arguments_show_the_first_screen_and_are_a_mistake(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch)
    assert stopped.value.code == 2
    assert "train what a config describes" in capsys.readouterr().err


def test_the_version(monkeypatch, capsys):
    assert re.fullmatch(r"lora_lightning \d+\.\d+.*\n", shown(monkeypatch, capsys, "--version"))


@pytest.mark.parametrize("name", ["fit", *FROM_CHECKPOINT])
def test_the_screen_of_a_command_fits_what_a_person_reads(name, columns, monkeypatch, capsys):
    lines = shown(monkeypatch, capsys, name, "--help").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= max(columns, 110)
    assert any("--help all" in line for line in lines[:6]), "where all is told stands at the top"
    assert any(line.startswith("  --model.lora.r ") and line.endswith("(8)") for line in lines)


def test_all_that_is_told_of_a_group(monkeypatch, capsys):
    page = shown(monkeypatch, capsys, "fit", "--help", "lora")
    assert "--model.lora.rank_pattern" in page
    assert "longest pattern that matches" in " ".join(page.split())
    assert "--trainer.max_epochs" not in page
    trainer = shown(monkeypatch, capsys, "fit", "--help", "trainer")
    assert "--trainer.benchmark" in trainer
    for internal in ("AdapterCheckpoints", "StepsTogether", "ContinuedCSVLogger"):
        assert internal not in "".join(trainer.split())
    assert "lora_lightning.FSDP2Strategy" in "".join(trainer.split())


def test_all_is_everything(monkeypatch, capsys):
    page = shown(monkeypatch, capsys, "fit", "--help", "all")
    for option in ("--trainer.benchmark", "--model.lora.slices", "--data.help", "--save_every"):
        assert option in page


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_option_of_a_small_command_is_told_of_with_its_default(name, monkeypatch, capsys):
    page = " ".join(shown(monkeypatch, capsys, name, "--help").split())
    for action in command_parser(name).options():
        assert action.help, f"{name} {action.dest} has no docstring"
        shown_as = action.option_strings or [action.metavar or action.dest]
        assert shown_as[-1] in page


HEAVY = {"torch", "lightning", "jsonargparse", "datasets", "transformers.modeling_utils"}


def heavy(*args):
    """Of what takes long to load, what a command has imported."""
    code = (
        "import sys; from lora_lightning.__main__ import main; sys.argv = ['lora-lightning', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["fitt"], ["-c", "run.yaml"]])
def test_the_first_screen_imports_nothing_heavy(args):
    assert heavy(*args) == "[]"


def test_the_help_of_a_small_command_imports_the_parser_alone():
    assert heavy("doctor", "--help") == "['jsonargparse']"


@pytest.mark.parametrize("args", [["fit", "--help"], ["doctor"]])
def test_a_command_that_reads_no_data_loads_neither_datasets_nor_transformers_models(args):
    """They take two seconds beside the five of torch and Lightning."""
    assert heavy(*args) == "['jsonargparse', 'lightning', 'torch']"


def test_a_command_without_a_config_is_a_function():
    for name in COMMANDS:
        assert callable(function_of(name))
