"""What was planted is found: ranks, energies, shared directions and amplification, by the command's own way."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import safetensors.numpy

from lora_lightning import LoRAConfig, huggingface, inject, save_adapter
from lora_lightning.commands.analyze import analyze
from lora_lightning.lora.errors import LoRAError
from tests.lora.directories import edit_config
from tests.tiny import make_bert

pytestmark = pytest.mark.filterwarnings("ignore::lora_lightning.AdapterWarning")
NAME = "encoder.layer.0.attention.self.query"
OTHER = "encoder.layer.1.attention.self.query"
SIDE = 32  # of the tiny BERT's attention


def frame(rng, n, q):
    """q orthonormal columns of n numbers."""
    return np.linalg.qr(rng.standard_normal((n, q)))[0]


def factors(rng, U, S, V, r, scale):
    """A (r, k) and B (m, r) with `scale B A = U diag(S) V^T`, mixed so that no row of A is a direction."""
    q = len(S)
    mix = rng.standard_normal((q, r))  # (q, r) of full rank, with its right inverse
    A = np.linalg.pinv(mix) @ (np.sqrt(S)[:, None] * V.T)
    B = (U * (np.sqrt(S) / scale)) @ mix
    return A, B


def write(directory, layers, *, r, alpha):
    """`layers`: A and B by module; as PEFT writes them."""
    directory.mkdir(parents=True)
    tensors = {}
    for name, (A, B) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(A)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(B)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    ends = sorted({name.rpartition(".")[2] for name in layers})
    said = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": ends}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


def told(adapters, folder, **options):
    analyze([str(a) for a in adapters], folder, **{"plots": False, **options})
    return json.loads((folder / "analysis.json").read_text())


def layers_of(adapter):
    return {layer["name"]: layer for layer in adapter["layers"]}


def test_planted_spectrum_overlap_and_amplification_are_found(tmp_path):
    """Two adapters of ranks 8 and 16 that share two of three directions by a known angle; W0 small where they are."""
    rng = np.random.default_rng(0)
    U, V = frame(rng, SIDE, SIDE), frame(rng, SIDE, SIDE)
    S1, S2 = np.array([4.0, 2.0, 1.0]), np.array([3.0, 1.5, 1.0])
    angle = 0.7
    turned = V[:, :3].copy()
    turned[:, 1] = math.cos(angle) * V[:, 1] + math.sin(angle) * V[:, 5]
    turned[:, 2] = V[:, 9]
    one = {n: factors(rng, U[:, :3], S1, V[:, :3], 8, 2.0) for n in (NAME, OTHER)}
    two = {n: factors(rng, U[:, :3], S2, turned, 16, 0.5) for n in (NAME, OTHER)}
    write(tmp_path / "one", one, r=8, alpha=16)
    write(tmp_path / "two", two, r=16, alpha=8)
    base = make_bert(tmp_path / "bert")
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    inside = np.array([0.3, -0.2, 0.1])
    W0 = (U * np.concatenate([inside, np.full(SIDE - 3, 5.0)])) @ V.T
    tensors[f"{NAME}.weight"] = W0.astype(np.float32)
    safetensors.numpy.save_file(tensors, base / "model.safetensors", {"format": "pt"})

    found = told([tmp_path / "one", tmp_path / "two"], tmp_path / "out", base_model=str(base))
    first, second = (layers_of(adapter)[NAME] for adapter in found["adapters"])
    np.testing.assert_allclose(first["singular_values"], S1, rtol=1e-6)
    np.testing.assert_allclose(second["singular_values"], S2, rtol=1e-6)
    np.testing.assert_allclose(first["energy"], np.cumsum(S1**2) / 21, rtol=1e-6)
    assert math.isclose(first["stable_rank"], 21 / 16, rel_tol=1e-6)
    assert first["ranks"] == {"90%": 2, "95%": 2, "99%": 3}
    assert (first["r"], first["scale"], second["r"], second["scale"]) == (8, 2.0, 16, 0.5)
    assert math.isclose(first["base"]["in_update"], np.linalg.norm(inside), rel_tol=1e-6)
    assert math.isclose(first["base"]["amplification"], math.sqrt(21) / np.linalg.norm(inside), rel_tol=1e-6)
    assert math.isclose(first["base"]["in_w0"], 5 * math.sqrt(3), rel_tol=1e-6)
    w0_norm = math.sqrt(np.sum(inside**2) + 25 * (SIDE - 3))
    assert math.isclose(first["base"]["relative"], math.sqrt(21) / w0_norm, rel_tol=1e-6)
    assert math.isclose(first["base"]["by_chance"], 3 * w0_norm / SIDE, rel_tol=1e-6)
    (pair,) = found["pairs"]
    sides = {layer["side"]: np.array(layer["phi"]) for layer in pair["layers"] if layer["name"] == NAME}
    squares = np.diag([1.0, math.cos(angle) ** 2, 0.0])
    wanted = squares.cumsum(0).cumsum(1) / np.minimum.outer([1, 2, 3], [1, 2, 3])
    np.testing.assert_allclose(sides["update_in"], wanted, atol=1e-6)
    same = np.minimum.outer([1, 2, 3], [1, 2, 3]) / np.minimum.outer([1, 2, 3], [1, 2, 3])
    np.testing.assert_allclose(sides["update_out"], same, atol=1e-6)
    assert math.isclose(sides["A"][2, 2], wanted[2, 2], abs_tol=1e-6)  # A's own order is another, its span is not
    assert math.isclose(sides["B"][2, 2], 1.0, abs_tol=1e-6)
    cut = told([tmp_path / "two"], tmp_path / "cut", truncate=0.999)["truncation"]
    assert cut["ranks"] == {NAME: [16, 3], OTHER: [16, 3]}, "what was planted, whatever the adapter had room for"
    assert "name the run" in cut["cost"]["not_measured"]


def spoil_weights(change):
    def spoil(folder):
        file = folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file(dict(filter(None, (change(k, v) for k, v in tensors.items()))), file)

    return spoil


SPOILED = {
    "peft_type LORA": lambda folder: edit_config(folder, peft_type="LOHA"),
    "shape of rank 4": lambda folder: edit_config(folder, r=5),
    "--base_model": lambda folder: edit_config(folder, init_lora_weights="pissa"),
    f"no 'base_model.model.{NAME}.lora_B.weight'": spoil_weights(lambda k, v: (k, v) if "lora_A" in k else None),
    "finite": spoil_weights(lambda k, v: (k, v * np.inf)),
    "no adapter's directory": shutil.rmtree,
}


def test_what_cannot_be_analysed_is_refused_in_one_line(tmp_path):
    rng = np.random.default_rng(0)
    layer = factors(rng, frame(rng, 8, 2), np.ones(2), frame(rng, 6, 2), 4, 1)
    plain, other = (write(tmp_path / name, {name: layer}, r=4, alpha=4) for name in (NAME, OTHER))
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint.ckpt").write_bytes(b"no checkpoint")
    cases = {"no adapter's directory": tmp_path / "empty", "not a whole checkpoint": tmp_path / "checkpoint.ckpt"}
    for number, (match, spoil) in enumerate(SPOILED.items()):
        spoil(folder := shutil.copytree(plain, tmp_path / str(number)))
        cases[f"(?:){match}"] = folder
    for match, path in cases.items():
        with pytest.raises(LoRAError, match=match) as caught:
            told([path], tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    requests = {
        "takes one adapter": {"truncate": 0.5, "adapters": [str(plain), str(other)]},
        "no layer of one name": {"adapters": [str(plain), str(other)]},
        "needs an adapter": {"adapters": []},
        "no folder": {"base_model": str(tmp_path / "nowhere")},
        "layers: '.' ": {"layers": "("},
        "got one adapter": {"layers": ".*", "plots": True},
        "holds files that are not an analysis": {"output_dir": plain},
    }
    for match, options in requests.items():
        with pytest.raises(LoRAError, match=match):
            analyze(**{"adapters": [str(plain)], "output_dir": tmp_path / "out", "plots": False, **options})


def test_w0_of_another_base_is_refused(tmp_path):
    base = make_bert(tmp_path / "bert")
    model = huggingface(str(base), num_labels=2)
    inject(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "adapter", task_type="SEQ_CLS")
    other = make_bert(tmp_path / "other", seed=1)
    told([tmp_path / "adapter"], tmp_path / "fits", base_model=str(base))
    with pytest.raises(LoRAError, match="first encoder"):
        told([tmp_path / "adapter"], tmp_path / "out", base_model=str(other))
    options = {"base_model": str(other), "allow_other_base": True}
    (adapter,) = told([tmp_path / "adapter"], tmp_path / "out", **options)["adapters"]
    assert adapter["layers"][0]["base"]["w0_norm"] > 0
    assert adapter["layers"][0]["base"]["amplification"] is None  # of an update that is zero
