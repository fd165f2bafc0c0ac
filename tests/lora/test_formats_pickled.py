"""Old pickled files: tensors and nothing else come out of them, whatever is in them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, load_loralib, save_adapter
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.peft.config import CONFIG, PICKLED, WEIGHTS
from lora_lightning.lora.formats.tensor_files import read_pickled
from tests.factories import FAMILIES, assert_same, move, snapshot

BERT = FAMILIES["bert"]


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def saved(tmp_path):
    """A model, its directory as PEFT writes it, and its tensors."""
    model = BERT.build()
    inject(model, LoRAConfig(r=2, modules_to_save=["classifier"]))
    save_adapter(move(model), tmp_path / "a")
    return model, tmp_path / "a", safetensors.torch.load_file(tmp_path / "a" / WEIGHTS)


@pytest.mark.parametrize("legacy", [False, True])
def test_pefts_old_file_loads_as_its_safetensors_would(saved, legacy):
    model, directory, tensors = saved
    (directory / WEIGHTS).unlink()
    torch.save(tensors, directory / PICKLED, _use_new_zipfile_serialization=not legacy)
    other = BERT.build()
    load_adapter(other, directory)
    assert torch.equal(BERT.run(other), BERT.run(model))


def test_safetensors_win_where_there_are_both(saved):
    model, directory, tensors = saved
    torch.save({key: tensor + 1 for key, tensor in tensors.items()}, directory / PICKLED)
    other = BERT.build()
    load_adapter(other, directory)
    assert torch.equal(BERT.run(other), BERT.run(model))
    (directory / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(AdapterError, match=f"{WEIGHTS} is not a whole safetensors file"):
        load_adapter(BERT.build(), directory)
    for name in (WEIGHTS, PICKLED):
        (directory / name).unlink()
    with pytest.raises(AdapterError, match=f"no file .*{WEIGHTS}, and no {PICKLED} beside it"):
        load_adapter(BERT.build(), directory)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "nested", "beside tensors"])
@pytest.mark.parametrize("entry", ["peft", "loralib"])
def test_a_malicious_pickle_executes_nothing(saved, tmp_path, monkeypatch, form, entry):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    _, directory, tensors = saved
    (directory / WEIGHTS).unlink()
    touched, path = tmp_path / "touched", directory / PICKLED
    bomb = Bomb(touched)
    content = {"nested": {"state_dict": bomb}, "beside tensors": {**tensors, "x": bomb}}.get(form, bomb)
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    model = BERT.build()
    before = snapshot(model)
    with pytest.raises(AdapterError, match="holds more than tensors, and nothing else in it is opened") as caught:
        load_adapter(model, directory) if entry == "peft" else load_loralib(model, path, r=2, alpha=4)
    assert "\n" not in str(caught.value)
    assert not touched.exists()
    assert_same(model, before)
    pickle.loads(pickle.dumps(bomb))
    assert touched.exists(), "the bomb is a real one"


CONTENTS = {
    "a list": ([torch.ones(2)], "must hold a state dict, tensors by name, got a list"),
    "a tensor": (torch.ones(2), "got a Tensor"),
    "numbers": ({"a": 3}, "got a int under 'a'"),
    "numbered": ({1: torch.ones(2)}, "tensors by name, got a dict"),
    "nested": ({"other": {"a": torch.ones(2)}}, "got a dict under 'other'"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "plain tensors, got a Tensor under 'a'"),
    "meta": ({"a": torch.ones(3, device="meta")}, "plain tensors, got a Tensor under 'a'"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_anything_but_a_state_dict_is_refused(tmp_path, name):
    content, match = CONTENTS[name]
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(AdapterError, match=match):
        read_pickled(tmp_path / "x.bin", wrappers=("state_dict",))


def test_modules_and_scripts_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello", "world")
    for name in ("module", "script", "zip"):
        with pytest.raises(AdapterError, match=rf"{name}.pt is torn or holds more than tensors"):
            read_pickled(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_torn_file_is_one_error_wherever_it_is_cut(tmp_path, legacy):
    whole = tmp_path / "whole.bin"
    torch.save({"a.lora_A": torch.ones(20, 3), "b": torch.ones(5)}, whole, _use_new_zipfile_serialization=not legacy)
    data = whole.read_bytes()
    for cut in (0, 1, 2, 10, 100, len(data) // 3, len(data) // 2, len(data) - 30, len(data) - 1):
        (tmp_path / "x.bin").write_bytes(data[:cut])
        with pytest.raises(AdapterError, match=r"x\.bin is torn") as caught:
            read_pickled(tmp_path / "x.bin")
        assert "\n" not in str(caught.value)
    with pytest.raises(AdapterError, match="no file"):
        read_pickled(tmp_path / "nowhere.bin")


def test_a_directory_without_a_record_is_read_from_the_old_file_too(saved):
    _, directory, tensors = saved
    shutil.copytree(directory, directory.with_name("b"))
    (directory.with_name("b") / WEIGHTS).unlink()
    torch.save({**tensors, "base_model.model.x.lora_A.weight": torch.ones(2, 2)}, directory.with_name("b") / PICKLED)
    with pytest.raises(AdapterError, match="the model has no module 'x'"):
        load_adapter(BERT.build(), directory.with_name("b"))
    assert json.loads((directory / CONFIG).read_text())["peft_type"] == "LORA"


def test_a_bit_that_flipped_in_a_zip_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(1000.0)}, path)
    data = bytearray(path.read_bytes())
    place = bytes(data).index(torch.arange(500.0, 510.0).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["a"][500] != 500
    with pytest.raises(AdapterError, match=r"x\.bin is torn .*'x/data/0' fails its checksum"):
        read_pickled(path)
