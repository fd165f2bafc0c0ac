"""How a command ends: exit codes, the place of an exception, and what `--debug` adds."""

import os
import re
import subprocess
import sys

import pytest

from lora_lightning import __main__ as entry
from lora_lightning.cli.exit_codes import CODES, DEBUG, exit_code_and_line
from lora_lightning.lora.errors import LoRAError
from tests.command.process import REPOSITORY, command


def raised(function):
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def fails(monkeypatch, capsys):
    """The exit code and the error output of a command that raises this."""

    def end(error, *args):
        def run(_):
            raise error

        os.environ.pop(DEBUG, None)
        monkeypatch.setattr(entry, "run", run)
        with pytest.raises(SystemExit) as stopped:
            command(monkeypatch, "fit", *args)
        return stopped.value.code, capsys.readouterr().err

    yield end
    os.environ.pop(DEBUG, None)


def test_an_exception_keeps_its_type_and_message_and_names_its_place():
    code, said = exit_code_and_line(raised(lambda: 1 / 0))
    assert code == 1
    assert re.fullmatch(
        r"ZeroDivisionError: .* zero \(.*test_outcome.py:.*<lambda>; --debug shows the traceback\)", said
    )
    ours = exit_code_and_line(raised(lambda: subprocess.run(["true"], check=False, timeout="soon")))[1]
    assert "test_outcome.py:" in ours, "of a user's own code and not of the library that it called"
    for error in (RuntimeError("out of memory, says my loader"), FileNotFoundError(2, "gone", "x")):
        code, said = exit_code_and_line(raised(lambda error=error: (_ for _ in ()).throw(error)))
        assert (code, said.partition(":")[0]) == (1, type(error).__name__), "not taken for an error that is known"


def test_a_mistake_is_2_and_ctrl_c_130_and_they_say_nothing_of_a_place(fails):
    assert fails(LoRAError("r must be 1")) == (2, "lora-lightning: error: r must be 1\n")
    answered_by_lightning = SystemExit(1)
    answered_by_lightning.__context__ = KeyboardInterrupt()
    for error in (KeyboardInterrupt(), answered_by_lightning):
        assert fails(error) == (130, "lora-lightning: error: stopped by Ctrl-C\n")


@pytest.mark.parametrize("error", [LoRAError("r must be 1"), ZeroDivisionError("no")])
def test_debug_adds_the_traceback_and_keeps_line_and_code(error, fails):
    code, plain = fails(error)
    assert "Traceback" not in plain
    same, shown = fails(error, "--debug")
    assert same == code
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith(plain)
    assert os.environ[DEBUG] == "1", "processes that the command starts show theirs too"


def test_a_reader_that_has_gone_is_no_error():
    shown = subprocess.run(
        f"{sys.executable} -m lora_lightning --help | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() in ("0", "141")
    assert shown.stderr == ""


def test_the_exit_codes_are_documented():
    page = (REPOSITORY / "docs" / "command.md").read_text()
    for code in (*CODES, 141):
        assert f"| {code} |" in page
