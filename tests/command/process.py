"""The installed command as a user's shell runs it, and in this process, which saves its imports."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("lora-lightning")


def command(monkeypatch, *args):
    """`lora-lightning ARGS` here; a mistake is a SystemExit."""
    from lora_lightning.__main__ import main

    monkeypatch.setattr("sys.argv", ["lora-lightning", *map(str, args)])
    main()


def called(monkeypatch, capsys, *args):
    """Exit code and what was said."""
    capsys.readouterr()
    try:
        command(monkeypatch, *args)
    except SystemExit as stopped:
        return stopped.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


def ends(monkeypatch, capsys, *args):
    """The one line that a command ends with, and its exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *args)
    shown, start = capsys.readouterr().err, "lora-lightning: error: "
    lines = [line.removeprefix(start) for line in shown.splitlines() if line.startswith(start)]
    assert len(lines) == 1, shown
    assert "Traceback" not in shown
    return lines[0], stopped.value.code


def mistake(monkeypatch, capsys, *args):
    """The one line that a mistake ends with."""
    said, code = ends(monkeypatch, capsys, *args)
    assert code == 2
    return said


def files_in(folder):
    """What is in each file."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def run(*args, cwd, ok=True, timeout=300, **env):
    """Run `lora-lightning ARGS`; returns the finished process with its output as text."""
    done = subprocess.run(
        [str(COMMAND), *map(str, args)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert (done.returncode == 0) == ok, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def logged_rows(file):
    """What a log says of the training itself, by row: without what a clock and the memory said beside it."""
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    measured = ("throughput/", "memory/")
    kept = [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]
    return [row for row in kept if any(value for name, value in row.items() if name not in ("step", "epoch"))]
