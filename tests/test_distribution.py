"""What is published: an sdist, the wheel that is built from it, and that wheel in an environment of its own."""

from __future__ import annotations

import email
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora_lightning

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lora_lightning.__file__).parent


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], check=False, cwd=cwd, capture_output=True, text=True, timeout=300
    )
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
    (wheel,), (sdist,) = (list((folder / "dist").glob(ending)) for ending in ("*.whl", "*.tar.gz"))
    return SimpleNamespace(wheel=wheel, sdist=sdist, tracked=set(filter(None, tracked)), folder=folder)


def test_the_wheel_holds_each_file_of_the_package_and_no_other(built):
    of_package = {name for name in built.tracked if name.startswith("lora_lightning/") and (ROOT / name).is_file()}
    with zipfile.ZipFile(built.wheel) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert inside == of_package


def test_the_sdist_builds_again_and_carries_the_licence(built):
    with tarfile.open(built.sdist) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "lora_lightning/py.typed"} <= inside


def test_the_wheel_says_what_it_is(built):
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(wheel.read(name))
    assert (told["Name"], told["License-Expression"]) == ("lora_lightning", "Apache-2.0")
    assert told.get_all("License-File") == ["LICENSE"]
    torch = next(line for line in told.get_all("Requires-Dist") or [] if line.startswith("torch"))
    assert torch == "torch<3,>=2.9"
    assert {"demo", "lm", "vision", "onnx", "plots", "dev"} <= set(told.get_all("Provides-Extra") or [])


def test_the_installed_wheel_runs_without_the_tree(built, tmp_path):
    """Its dependencies are this environment's own, by a path file; the package itself is the wheel's."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, built.wheel, cwd=tmp_path)
    where = run(python, "-c", "import lora_lightning; print(lora_lightning.__file__)", cwd=tmp_path).strip()
    assert Path(where).parent == site / "lora_lightning"
    assert "fit" in run(python, "-m", "lora_lightning", "--help", cwd=tmp_path)
    code = "import torch, lora_lightning as l; print(l.inject(torch.nn.Linear(4, 4), l.LoRAConfig(r=2)).trainable)"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "16"
