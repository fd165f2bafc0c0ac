"""The installed command as a user's shell runs it, and in this process, which saves its imports."""

import csv
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("lora-lightning")


def command(monkeypatch, *args):
    """`lora-lightning ARGS` here; a mistake is a SystemExit."""
    from lora_lightning.__main__ import main

    monkeypatch.setattr("sys.argv", ["lora-lightning", *map(str, args)])
    main()


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
