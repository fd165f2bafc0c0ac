"""A folder is whole or absent, whatever happens while it is written."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lora_lightning import LoRAError
from lora_lightning.lora.formats import atomic_dir as staging
from lora_lightning.lora.formats.atomic_dir import human_size, stage_folder

Usage = namedtuple("Usage", "total used free")


def fill(target, text, needed=1, error=None):
    with stage_folder(target, needed) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file.txt").write_text(text)
        if error is not None:
            raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_comes_whole_and_replaces_the_older(tmp_path):
    for text in ("one", "two"):
        fill(tmp_path / "made" / "out", text)
        assert (tmp_path / "made" / "out" / "deep" / "file.txt").read_text() == text
    assert names(tmp_path / "made") == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_rights_that_the_umask_gives(umask, tmp_path):
    """safetensors gives its files to their owner alone, whom a model that others shall open does not help."""
    before = os.umask(umask)
    try:
        with stage_folder(tmp_path / "out", 0) as folder:
            (folder / "inner").mkdir()
            for file in (folder / "model.safetensors", folder / "inner" / "adapter_model.safetensors"):
                save_file({"weight": torch.ones(2)}, file)
                file.chmod(0o600)
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_what_fails_leaves_the_older_and_nothing_else(tmp_path, error):
    fill(tmp_path / "out", "one")
    with pytest.raises(type(error)):
        fill(tmp_path / "out", "two", error=error)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "deep" / "file.txt").read_text() == "one"


def test_a_move_that_fails_puts_the_older_back(tmp_path, monkeypatch):
    fill(tmp_path / "out", "one")
    real = staging.Path.replace

    def refuse(self, to):
        if ".new." in self.name:
            raise OSError("the disk went away")
        return real(self, to)

    monkeypatch.setattr(staging.Path, "replace", refuse)
    with pytest.raises(OSError, match="went away"):
        fill(tmp_path / "out", "two")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "deep" / "file.txt").read_text() == "one"


KILLED = """
import os, signal, sys
from pathlib import Path
from lora_lightning.lora.formats import atomic_dir as staging
target, when = Path(sys.argv[1]), sys.argv[2]
if when == "between the moves":
    real = Path.replace
    def replace(self, to):
        if ".new." in self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, to)
    Path.replace = replace
with staging.stage_folder(target, 1) as folder:
    (folder / "half").write_text("two")
    if when == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["while writing", "between the moves"])
def test_a_killed_process_leaves_no_half_and_the_next_clears_up(tmp_path, when):
    fill(tmp_path / "out", "one")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), when], check=False)
    assert done.returncode == -signal.SIGKILL
    left = [name for name in names(tmp_path) if name != "out"]
    assert left
    assert all(name.startswith(".out.") and name.endswith(".part") for name in left)
    with pytest.raises(RuntimeError):
        fill(tmp_path / "out", "two", error=RuntimeError("the next does no better"))
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "deep" / "file.txt").read_text() == "one"


def test_only_leftovers_of_dead_processes_of_this_machine_are_cleared(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, other = staging._host(), "elsewhere"
    stay = [f".out.{here}.{os.getppid()}.new.part", f".out.{other}.{dead.pid}.new.part", f".outer.{here}.{dead.pid}.x"]
    stay += [f".out.{here}.mine.new.part", "out2"]
    for name in (*stay, f".out.{here}.{dead.pid}.new.part", f".out.{here}.{dead.pid}.old.part"):
        (tmp_path / name).mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / f".out.{here}.1{dead.pid}.new.part").symlink_to(tmp_path / "kept")
    fill(tmp_path / "out", "one")
    assert set(names(tmp_path)) == {*stay, "out", "kept", f".out.{here}.1{dead.pid}.new.part"}


def test_too_little_space_is_said_before_the_first_byte(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(9e9, 7e9, 2_345_000))
    with pytest.raises(LoRAError, match=r"needs about 1\.5 GB and '.*' has 2\.3 MB free.*--output_dir"):
        fill(tmp_path / "a" / "out", "one", needed=1_500_000_000)
    assert names(tmp_path) == []
    assert asked == [tmp_path], "the nearest folder that there is"
    fill(tmp_path / "a" / "out", "one", needed=2_000_000)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_disk_that_fills_up_is_one_clear_error(tmp_path, error):
    fill(tmp_path / "out", "one")
    with pytest.raises(LoRAError, match=r"no space was left for '.*out' \(1\.5 MB are needed, .*nothing was written"):
        fill(tmp_path / "out", "two", 1_500_000, error)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "deep" / "file.txt").read_text() == "one"


def test_another_error_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="broken"):
        fill(tmp_path / "out", "one", error=OSError(errno.EIO, "broken"))


def test_a_folder_that_may_not_be_written_is_said_in_one_line(tmp_path):
    with pytest.raises(LoRAError, match=r"out' cannot be written \(Permission denied\): nothing was; name a folder"):
        fill(tmp_path / "out", "one", error=PermissionError(errno.EACCES, "no"))
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(LoRAError, match=r"is a mount point.*name a folder in it"):
        fill(tmp_path, "one")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (90_900_000, "90.9 MB"), (7e13, "70.0 TB")]
)
def test_sizes_for_people(size, text):
    assert human_size(size) == text
