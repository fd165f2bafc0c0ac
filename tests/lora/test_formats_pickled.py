"""Law: an old `adapter_model.bin` is read as tensors or refused; whatever is in it, nothing of it runs."""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_lightning import load_loralib
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.peft.config import PICKLED, WEIGHTS
from lora_lightning.lora.formats.tensor_files import read_pickled
from tests.lora.accidents import ANY
from tests.lora.directories import refused
from tests.lora.fuzz_support import Origin, examples, net


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    origin = Origin("peft", tmp_path_factory.mktemp("peft"))
    (origin.folder / WEIGHTS).unlink()
    return origin


def saved(values, *, zipped=True) -> bytes:
    file = io.BytesIO()
    torch.save(values, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def load(origin, data: bytes) -> str:
    (origin.folder / PICKLED).write_bytes(data)
    return origin.load()


def test_it_loads_as_its_safetensors_would_which_win_where_there_are_both(origin):
    assert {load(origin, saved(origin.tensors, zipped=zipped)) for zipped in (True, False)} == {"same"}
    others = saved({key: tensor + 1 for key, tensor in origin.tensors.items()})
    assert load(origin, others) == "other"
    (origin.folder / WEIGHTS).write_bytes(origin.good[WEIGHTS])
    assert load(origin, others) == "same"
    (origin.folder / WEIGHTS).write_bytes(b"torn")
    refused(origin.folder, f"{WEIGHTS} is not a whole safetensors file", origin.model)
    for name in (WEIGHTS, PICKLED):
        (origin.folder / name).unlink()
    refused(origin.folder, f"no file .*{WEIGHTS}, and no {PICKLED} beside it", origin.model)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_met_an_accident(origin, zipped):
    good = saved(origin.tensors, zipped=zipped)

    @examples(200)
    @given(accident=st.sampled_from(ANY), seed=st.integers(0, 2**64))
    def check(accident, seed):
        assert load(origin, accident(good, random.Random(seed))) in ("refused", "same", "other")

    check()


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def calls(marker: str) -> dict[str, object]:
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"open({marker!r}, 'w').close()"),
        "getattr": Call(getattr, "x", "upper"),
        "partial": Call(functools.partial(os.system, f"touch {marker}")),
        "torch.save": Call(torch.save, {}, marker),
        "torch.hub": Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "text protocol", "in a key", "nested"])
@pytest.mark.parametrize("what", calls(""))
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(origin, what, form, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "ran"
    call = calls(str(marker))[what]
    if form in ("zip", "legacy"):
        data = saved({**origin.tensors, "more": call}, zipped=form == "zip")
    elif form in ("in a key", "nested"):
        data = saved(origin.tensors | {"x": {("k", 1): [call]}} if form == "in a key" else {"state_dict": call})
    else:
        data = pickle.dumps({"more": call}, protocol=0 if form == "text protocol" else 2)
    assert load(origin, data) == "refused"
    assert "holds more than tensors, and nothing else in it is opened" in origin.said
    refused(origin.folder / PICKLED, PICKLED, net(), load=load_loralib, r=2, alpha=4)
    assert not marker.exists()
    if what == "os.system":
        pickle.loads(pickle.dumps(call))
        assert marker.exists(), "the call is a real one"


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    return file.getvalue()


def strange(tensors):
    """Files that unpickle safely and are no adapter, or do not unpickle, and the words with which each is refused."""
    key = next(k for k in tensors if "lora_A" in k)
    other, tensor = key.replace("lora_A", "lora_B"), tensors[key]
    wide = {key: torch.zeros(1).expand(10**9, 4), other: torch.zeros(1).expand(4, 10**9)}
    return {
        "no dict": (saved([tensor]), "must hold a state dict, tensors by name, got a list"),
        "a tensor": (saved(tensor), "got a Tensor"),
        "nothing": (saved({}), ""),
        "key of a number": (saved(tensors | {5: tensor}), "tensors by name, got a dict"),
        "a list in a tensor's place": (saved(tensors | {key: tensor.tolist()}), f"got a list under '{key}'"),
        "none in a tensor's place": (saved(tensors | {key: None}), f"got a NoneType under '{key}'"),
        "in another dict": (saved({"state_dict": tensors}), "got a dict under 'state_dict'"),
        "wide views of one number": (saved(tensors | wide), ""),
        "on no device": (saved(tensors | {key: tensor.to("meta")}), f"plain tensors, got a Tensor under '{key}'"),
        "sparse": (saved(tensors | {key: tensor.to_sparse()}), f"plain tensors, got a Tensor under '{key}'"),
        "whole numbers": (saved(tensors | {key: tensor.int()}), ""),
        "not finite": (saved(tensors | {key: tensor * float("nan")}), "not finite"),
        "a deep list": (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", ""),
        "a long number": (b"\x80\x02" + pickle.LONG4 + (2**31 - 1).to_bytes(4, "little") + b"\x01.", ""),
        "a zip of another": (zip_bomb(), ""),
        "no stop": (b"\x80\x02}", ""),
    }


@pytest.mark.parametrize("what", strange({"lora_A": torch.ones(1)}))
def test_a_pickle_of_other_things_is_refused(origin, what):
    data, words = strange(origin.tensors)[what]
    assert load(origin, data) == "refused"
    assert words in origin.said


def test_modules_scripts_torn_files_and_flipped_bits_are_refused_by_the_file(tmp_path):
    path = tmp_path / "x.bin"
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello", "world")
    for name in ("module", "script", "zip"):
        with pytest.raises(AdapterError, match=rf"{name}.pt is torn or holds more than tensors"):
            read_pickled(tmp_path / f"{name}.pt")
    torch.save({"a": torch.arange(1000.0)}, path)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[data.index(torch.arange(500.0, 510.0).numpy().tobytes())] ^= 1
    for bad, words in [(data[:cut], "x.bin is torn") for cut in (0, 100, len(data) - 1)] + [
        (bytes(flipped), r"x\.bin is torn .*'x/data/0' fails its checksum")
    ]:
        path.write_bytes(bad)
        with pytest.raises(AdapterError, match=words):
            read_pickled(path)
    assert torch.load(path, weights_only=True)["a"][500] != 500, "torch reads it without a word"
    with pytest.raises(AdapterError, match="no file"):
        read_pickled(tmp_path / "nowhere.bin")
