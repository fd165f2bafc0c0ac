from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats import tensor_files as storage
from lora_lightning.lora.formats.atomic_dir import write_bytes
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
