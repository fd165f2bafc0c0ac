"""Law: an old `adapter_model.bin` is read as tensors or refused; whatever is in it, nothing of it runs."""

from __future__ import annotations

import functools
import io
import pickle
import random
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.lora.accidents import ANY
from tests.lora.fuzz_support import WEIGHTS, Origin, examples, little_memory, quick_folder

PICKLE = "adapter_model.bin"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    with quick_folder(tmp_path_factory.mktemp("peft")) as folder, little_memory():
        origin = Origin("peft", folder)
        (folder / WEIGHTS).unlink()
        yield origin


def saved(values, *, zipped=True) -> bytes:
    file = io.BytesIO()
    torch.save(values, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def load(origin, data: bytes) -> str:
    (origin.folder / PICKLE).write_bytes(data)
    return origin.load()


def test_whole_it_is_read_or_refused_in_one_line(origin):
    results = {load(origin, saved(origin.tensors, zipped=zipped)) for zipped in (True, False)}
    assert results in ({"same"}, {"refused"})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_met_an_accident(origin, zipped):
    good = saved(origin.tensors, zipped=zipped)

    @examples(400)
    @given(accident=st.sampled_from(ANY), seed=st.integers(0, 2**64))
    def check(accident, seed):
        assert load(origin, accident(good, random.Random(seed))) in ("refused", "same", "other")

    check()


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def calls(marker: str) -> dict[str, object]:
    import os
    import subprocess
    import webbrowser

    text = f"open({marker!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "subprocess": Call(subprocess.call, ["touch", marker]),
        "eval": Call(eval, text),
        "exec": Call(exec, text),
        "open": Call(open, marker, "w"),
        "getattr": Call(getattr, "x", "upper"),
        "partial": Call(functools.partial(os.system, f"touch {marker}")),
        "import": Call(__import__, "this"),
        "browser": Call(webbrowser.open, f"file://{marker}"),
        "torch.load": Call(torch.load, marker),
        "torch.save": Call(torch.save, {}, marker),
        "torch.hub": Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "text protocol", "in a key"])
@pytest.mark.parametrize("what", calls(""))
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(origin, what, form, tmp_path):
    marker = tmp_path / "ran"
    call = calls(str(marker))[what]
    if form in ("zip", "legacy"):
        data = saved({**origin.tensors, "more": call}, zipped=form == "zip")
    elif form == "in a key":
        data = saved(origin.tensors | {"x": {("k", 1): [call]}})
    else:
        data = pickle.dumps({"more": call}, protocol=0 if form == "text protocol" else 2)
    assert load(origin, data) == "refused"
    assert not marker.exists()


def strange_values(tensors):
    """Dicts that unpickle safely and are no adapter."""
    key = next(k for k in tensors if "lora_A" in k)
    other = key.replace("lora_A", "lora_B")
    tensor = tensors[key]
    wide = {key: torch.zeros(1).expand(10**9, 4), other: torch.zeros(1).expand(4, 10**9)}
    return {
        "no dict": [tensor],
        "a number": 5,
        "nothing": {},
        "key of a number": tensors | {5: tensor},
        "a list in a tensor's place": tensors | {key: tensor.tolist()},
        "none in a tensor's place": tensors | {key: None},
        "in another dict": {"state_dict": tensors},
        "wide views of one number": tensors | wide,
        "on no device": tensors | {key: tensor.to("meta")},
        "sparse": tensors | {key: tensor.to_sparse()},
        "complex": tensors | {key: tensor.to(torch.complex64)},
        "whole numbers": tensors | {key: tensor.int()},
        "not finite": tensors | {key: tensor * float("nan")},
        "surplus": tensors | {"surplus": tensor},
        "missing": {k: t for k, t in tensors.items() if k != key},
    }


@pytest.mark.parametrize("what", strange_values({"lora_A": torch.ones(1)}))
def test_a_pickle_of_other_things_is_refused(origin, what):
    assert load(origin, saved(strange_values(origin.tensors)[what])) == "refused"


@pytest.mark.parametrize("what", ["deep", "long", "zip of another", "no stop"])
def test_a_pickle_made_by_hand_is_refused(origin, what):
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    long = b"\x80\x02" + pickle.LONG4 + (2**31 - 1).to_bytes(4, "little") + b"\x01."
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 50_000_000)
    data = {"deep": deep, "long": long, "zip of another": other.getvalue(), "no stop": b"\x80\x02}"}[what]
    assert len(data) < 500_000
    assert load(origin, data) == "refused"
