from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, save_adapter
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats import tensor_files as storage
from lora_lightning.lora.formats.atomic_dir import write_bytes, write_together
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.formats.tensor_files import read_tensors, write_tensors

METADATA = {"format": "pt", **{f"key{i}": str(i) for i in range(20)}}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


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
    for name, tensor in tensors.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], tensor)
    first = path.read_bytes()
    write_tensors(path, dict(reversed(tensors.items())), dict(reversed(METADATA.items())))
    assert path.read_bytes() == first


def test_another_process_writes_the_same_bytes(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; "
        "from lora_lightning.lora.formats.tensor_files import write_tensors;"
        "write_tensors(Path(sys.argv[1]), {c: torch.ones(2) for c in 'dacb'}, {f'k{i}': '' for i in range(20)})"
    )
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(storage.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(theirs)], check=True, env=environment)
    write_tensors(ours, {c: torch.ones(2) for c in "abcd"}, {f"k{i}": "" for i in range(20)})
    assert ours.read_bytes() == theirs.read_bytes()


def test_views_and_shared_memory_are_written_whole(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": whole.t(), "row": whole[1], "whole": whole, "grad": whole.clone().requires_grad_()}
    write_tensors(tmp_path / "x", tensors, METADATA)
    got, _ = read_tensors(tmp_path / "x")
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x"
    write_bytes(path, b"old")

    def broken(_):
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["missing", "directory", "empty", "text", "head", "tail", "longer", "length"])
def test_a_file_that_is_not_whole_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(50)}, METADATA)
    data = path.read_bytes()
    path.unlink()
    cut = {
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:1234",
        "head": data[:20],
        "tail": data[:-1],
        "longer": data + b"\0",
        "length": b"\xff" * 8 + data[8:],
    }
    if damage == "directory":
        path.mkdir()
    elif damage in cut:
        path.write_bytes(cut[damage])
    with pytest.raises(AdapterError, match=r"x\.safetensors") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


# ---- files that belong together

KILLED = """
import os, signal, sys, torch
from pathlib import Path
from torch import nn
from lora_lightning import LoRAConfig, inject, save_adapter

def adapted(r):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, LoRAConfig(r=r, alpha=4 * r, target_modules=["0", "1"]))
    for layer in model:
        nn.init.normal_(layer.lora_B)
    return model

old, new, real = adapted(2), adapted(3), os.replace
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
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, capture_output=True, text=True)
    codes = [int(code) for code in done.stdout.split()]
    assert codes == [-9, -9, -9, -9, 0, 0], "two go and two come"
    x = torch.randn(3, 4)
    wanted = {2: chain(2)(x), 3: chain(3)(x)}
    found = []
    for number in range(6):
        directory = tmp_path / str(number)
        assert (directory / "README.md").read_text() == "mine"
        ranks = [rank_of(read(directory, x), wanted) for read in (load_ours, load_pefts)]
        assert ranks[0] == ranks[1]
        found.append(ranks[0])
        save_adapter(chain(2), directory)
        assert sorted(path.name for path in directory.iterdir()) == ["README.md", CONFIG, WEIGHTS]
        assert load_ours(directory, x).equal(wanted[2])
    assert found == [2, None, None, None, 3, 3]


def rank_of(out, wanted):
    return None if out is None else next((r for r, y in wanted.items() if y.allclose(out, atol=1e-6)), "mixed")


def load_ours(directory, x):
    model = chain()
    try:
        load_adapter(model, directory)
    except AdapterError:
        return None
    return model(x).detach()


def load_pefts(directory, x):
    try:
        return peft.PeftModel.from_pretrained(chain(), directory)(x).detach()
    except (ValueError, OSError):
        return None


def test_a_save_whose_last_rename_fails_puts_the_old_files_back(tmp_path, monkeypatch):
    old = {"a": b"one", "b": b"two"}
    write_together(tmp_path / "x", old)
    real = os.replace
    for number in range(4):
        left = iter(range(number))

        def replace(*paths, left=left, number=number):
            if next(left, None) is None:
                monkeypatch.setattr(os, "replace", real)
                raise OSError("the disk went away")
            real(*paths)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(AdapterError, match=r"went away.* is as it was"):
            write_together(tmp_path / "x", {"a": b"three", "b": b"four"})
        assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == old
    monkeypatch.undo()
    write_together(tmp_path / "x", {"a": iter([b"th", memoryview(b"ree")]), "b": b"four"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == {"a": b"three", "b": b"four"}
