"""What is published: the wheel that is built from the sdist, and that wheel in an environment of its own."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora_lightning

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lora_lightning.__file__).parent


def run(*command: object, cwd: Path) -> str:
    """What it prints, in this environment without its own PYTHONPATH, which may name the tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words, to = [str(part) for part in command], {"cwd": cwd, "env": environment, "timeout": 300}
    done = subprocess.run(words, check=False, capture_output=True, text=True, **to)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Built from a copy of the tree, so that nothing is left in it; without isolation: setuptools is at hand."""
    folder = tmp_path_factory.mktemp("built")
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0") if (ROOT / ".git").exists() else []
    if not tracked:
        pytest.skip("not a git checkout: nothing says which files belong to the tree")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "tree")
    (wheel,) = (folder / "dist").glob("*.whl")
    return SimpleNamespace(wheel=wheel, tracked=set(filter(None, tracked)))


def test_the_wheel_holds_each_file_of_the_package_and_no_other(built):
    of_package = {name for name in built.tracked if name.startswith("lora_lightning/") and (ROOT / name).is_file()}
    with zipfile.ZipFile(built.wheel) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        assert inside == of_package
        assert [name for name in sorted(inside) if wheel.read(name) != (ROOT / name).read_bytes()] == []
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(wheel.read(name))
    assert (told["Name"], told["License-Expression"]) == ("lora_lightning", "Apache-2.0")
    assert "torch<3,>=2.13" in told.get_all("Requires-Dist")
    assert {"demo", "lm", "vision", "plots", "dev"} <= set(told.get_all("Provides-Extra") or [])


def test_what_is_installed_runs_without_the_tree(built, tmp_path):
    """Its dependencies are this environment's own, by a path file; the package itself is what was built."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    alone = ("--quiet", "--no-deps", "--ignore-installed", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *alone, built.wheel, cwd=tmp_path)
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import lora_lightning; print(lora_lightning.__file__)", cwd=tmp_path).strip()
    assert Path(where).parent == site / "lora_lightning"
    for command in ([python.with_name("lora-lightning")], [python, "-m", "lora_lightning"]):
        assert "fit" in run(*command, "--help", cwd=tmp_path)
    run(python.with_name("lora-lightning"), "new", "mine", "--defaults", cwd=tmp_path)
    assert {"configs", "mine", "pyproject.toml", ".gitignore"} <= {path.name for path in (tmp_path / "mine").iterdir()}
    code = "import torch, lora_lightning as l; print(l.inject(torch.nn.Linear(4, 4), l.LoRAConfig(r=2)).trainable)"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "16"
