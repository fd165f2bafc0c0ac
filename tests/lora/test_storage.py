"""Files of tensors are written and read to the byte, and a file, a pair of files or a folder is whole or as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, save_adapter
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.atomic_dir import _host, stage_folder, write_together
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.formats.tensor_files import read_tensors, write_tensors
from tests.lora.directories import names

HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
METADATA = {"format": "pt", **{f"key{i}": str(i) for i in range(20)}}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- one file


@given(
    shapes=st.dictionaries(
        st.text('ab.é"\\', min_size=1, max_size=6), st.lists(st.integers(0, 3), max_size=3), max_size=5
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_what_is_written_is_what_is_read(tmp_path_factory, shapes, dtype):
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    write_tensors(path, tensors, METADATA)
    got, metadata = read_tensors(path)
    assert metadata == METADATA
    assert got.keys() == tensors.keys() == safetensors.torch.load_file(path).keys()
    assert all(got[name].dtype == dtype and torch.equal(got[name], tensor) for name, tensor in tensors.items())
    first = path.read_bytes()
    write_tensors(path, dict(reversed(tensors.items())), dict(reversed(METADATA.items())))
    assert path.read_bytes() == first


def test_views_and_shared_memory_are_written_whole(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": whole.t(), "row": whole[1], "whole": whole, "grad": whole.clone().requires_grad_()}
    write_tensors(tmp_path / "x", tensors, METADATA)
    got, _ = read_tensors(tmp_path / "x")
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


# ---- files that belong together

KILLED = """
import os, signal, sys
from pathlib import Path
from lora_lightning import save_adapter
from tests.lora.test_storage import chain

old, new, real = chain(2), chain(3), os.replace
for number in range(6):
    save_adapter(old, Path(sys.argv[1]) / str(number))
    (Path(sys.argv[1]) / str(number) / "README.md").write_text("mine")
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status))
        continue
    left = iter(range(number))
    def replace(*paths):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*paths)
    os.replace = replace
    save_adapter(new, Path(sys.argv[1]) / str(number))
    os._exit(0)
"""


def chain(r=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if r is not None:
        inject(model, LoRAConfig(r=r, alpha=4 * r, target_modules=["0", "1"]))
        for layer in model:
            nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.filterwarnings("ignore::lora_lightning.lora.errors.AdapterWarning")
def test_a_save_that_is_killed_at_any_rename_leaves_the_old_adapter_or_the_new_one_or_none(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=HERE)
    codes = [int(code) for code in done.stdout.split()]
    assert codes == [-9, -9, -9, -9, 0, 0], "two go and two come"
    x = torch.randn(3, 4)
    wanted = {2: chain(2)(x), 3: chain(3)(x)}
    found = []
    for number in range(6):
        directory = tmp_path / str(number)
        assert (directory / "README.md").read_text() == "mine"
        model = chain()
        with contextlib.suppress(AdapterError):
            load_adapter(model, directory)
        output = model(x)
        found.append(next((r for r, y in wanted.items() if y.equal(output)), None))
        assert found[-1] or output.equal(chain()(x)), "an adapter of which one file is there is not loaded"
        save_adapter(chain(2), directory)
        assert names(directory) == ["README.md", CONFIG, WEIGHTS]
        load_adapter(again := chain(), directory)
        assert again(x).equal(wanted[2])
    assert found == [2, None, None, None, 3, 3]


@pytest.mark.parametrize(("call", "times"), [("replace", 4), ("fsync", 2)])
def test_a_save_that_finds_no_room_at_any_call_puts_the_old_files_back(call, times, tmp_path, monkeypatch):
    old, real = {"a": b"one", "b": b"two"}, getattr(os, call)
    write_together(tmp_path / "old", old)
    for directory in ("old", "new"):
        for number in range(times if directory == "old" else 2):
            left = iter(range(number))

            def full(*args, left=left):
                if next(left, None) is None:
                    monkeypatch.undo()
                    raise OSError(errno.ENOSPC, "No space left on device")
                real(*args)

            monkeypatch.setattr(os, call, full)
            with pytest.raises(AdapterError, match=rf"{directory}' cannot be written .*No space left.* is as it was"):
                write_together(tmp_path / directory, {"a": b"three", "b": b"four"})
            assert contents(tmp_path / "old") == old
            assert names(tmp_path) == ["old"]
    write_together(tmp_path / "old", {"a": iter([b"th", memoryview(b"ree")]), "b": b"four"})
    assert contents(tmp_path / "old") == {"a": b"three", "b": b"four"}


# ---- a folder

Usage = namedtuple("Usage", "total used free")


def fill(target, text, needed=1, error=None):
    with stage_folder(target, needed) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file.txt").write_text(text)
        if error is not None:
            raise error


def holds(folder, text):
    """Whether "out" in the folder is of this text, and nothing is beside it."""
    return names(folder) == ["out"] and (folder / "out" / "deep" / "file.txt").read_text() == text


def test_files_have_the_rights_that_the_umask_gives(tmp_path):
    """safetensors gives its files to their owner alone, whom a model that others shall open does not help."""
    before = os.umask(0o027)
    try:
        with stage_folder(tmp_path / "out", 0) as folder:
            (folder / "inner").mkdir()
            for file in (folder / "model.safetensors", folder / "inner" / "adapter_model.safetensors"):
                file.touch(mode=0o600)
    finally:
        os.umask(before)
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o640, 0o640]


FULL = r"no space was left for '.*out' \(1\.5 MB are needed, .*nothing was written"
SERIALIZING = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
FAILURES = [
    (ValueError("no"), ValueError, "no"),
    (KeyboardInterrupt(), KeyboardInterrupt, ""),
    (SystemExit(3), SystemExit, "3"),
    (OSError(errno.EIO, "broken"), OSError, "broken"),
    *((OSError(number, "no room"), LoRAError, FULL) for number in (errno.ENOSPC, errno.EDQUOT)),
    (SERIALIZING, LoRAError, FULL),
    (PermissionError(errno.EACCES, "no"), LoRAError, r"out' cannot be written \(Permission denied\).*name a folder"),
]


@pytest.mark.parametrize(("error", "kind", "match"), FAILURES, ids=range(len(FAILURES)))
def test_what_fails_leaves_the_older_and_nothing_else(tmp_path, error, kind, match):
    with pytest.raises(kind, match=match):
        fill(tmp_path / "out", "one", 1_500_000, error)
    assert names(tmp_path) == []
    for text in ("none", "one"):
        fill(tmp_path / "out", text)
        assert holds(tmp_path, text)
    with pytest.raises(kind, match=match):
        fill(tmp_path / "out", "two", 1_500_000, error)
    assert holds(tmp_path, "one")


KILLED_FOLDER = """
import os, signal, sys
from pathlib import Path
from lora_lightning.lora.formats.atomic_dir import stage_folder
if sys.argv[2] == "between the moves":
    real = Path.replace
    def replace(self, to):
        if ".new." in self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, to)
    Path.replace = replace
with stage_folder(Path(sys.argv[1]), 1) as folder:
    (folder / "half").write_text("two")
    if sys.argv[2] == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["while writing", "between the moves"])
def test_a_killed_process_leaves_no_half_and_the_next_clears_up(tmp_path, when):
    fill(tmp_path / "out", "one")
    done = subprocess.run([sys.executable, "-c", KILLED_FOLDER, str(tmp_path / "out"), when], check=False, env=HERE)
    assert done.returncode == -signal.SIGKILL
    left = [name for name in names(tmp_path) if name != "out"]
    assert left
    assert all(name.startswith(".out.") and name.endswith(".part") for name in left)
    with pytest.raises(RuntimeError):
        fill(tmp_path / "out", "two", error=RuntimeError("the next does no better"))
    assert holds(tmp_path, "one")


def test_only_leftovers_of_dead_processes_of_this_machine_are_cleared(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, other = _host(), "elsewhere"
    stay = [f".out.{here}.{os.getppid()}.new.part", f".out.{other}.{dead.pid}.new.part", f".outer.{here}.{dead.pid}.x"]
    stay += [f".out.{here}.mine.new.part", "out2", "kept"]
    for name in (*stay, f".out.{here}.{dead.pid}.new.part", f".out.{here}.{dead.pid}.old.part"):
        (tmp_path / name).mkdir()
    link = f".out.{here}.1{dead.pid}.new.part"
    (tmp_path / link).symlink_to(tmp_path / "kept")
    fill(tmp_path / "out", "one")
    assert set(names(tmp_path)) == {*stay, "out", link}


def test_too_little_space_is_said_before_the_first_byte(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(9e9, 7e9, 2_345_000))
    with pytest.raises(LoRAError, match=r"needs about 1\.5 GB and '.*' has 2\.3 MB free.*--output_dir"):
        fill(tmp_path / "a" / "out", "one", needed=1_500_000_000)
    assert names(tmp_path) == []
    assert asked == [tmp_path], "the nearest folder that there is"
    fill(tmp_path / "a" / "out", "one", needed=2_000_000)


def test_a_mount_point_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(LoRAError, match=r"is a mount point.*name a folder in it"):
        fill(tmp_path, "one")
