"""What tests of projects have in common: their configs, git, and make in an environment of their own."""

import os
import subprocess
import sys
from pathlib import Path

from lora_lightning.commands.new import questions
from tests.command.process import REPOSITORY

TASKS = list(questions()["task"]["choices"].values())


def configs_of(project, *names):
    return [project / "configs" / f"{name}.yaml" for name in names]


def offline(project):
    """The overlay of the tiny backbone, where the experiment has another."""
    return ["offline"] if (project / "configs" / "offline.yaml").exists() else []


def git(folder, *args):
    done = subprocess.run(["git", *args], cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def environment(project):
    """An environment of the project's own, whose interpreter sees what is installed here, and the repository."""
    folder = project / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    inside = next(folder.glob("lib/python*/site-packages"))
    installed = [path for path in sys.path if path.endswith("site-packages")]
    (inside / "here.pth").write_text("\n".join([str(REPOSITORY), *installed]) + "\n")
    for name in ("lora-lightning", "mypy"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m {name.replace("-", "_")} "$@"\n')
        program.chmod(0o755)
    (folder / "bin" / "ruff").symlink_to(Path(sys.executable).with_name("ruff"))
    (folder / f"{project.name}-ready").touch()


def make(folder, *args):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    done = subprocess.run(
        ["make", *args], cwd=folder, check=False, capture_output=True, text=True, env=clean, timeout=1800
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
