"""What was planted is found: ranks, energies, shared directions and amplification, by the command's own way."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import (
    LoRAConfig,
    LoRAModule,
    LoRATrainer,
    Supervised,
    huggingface,
    inject,
    load_adapter,
    save_adapter,
)
from lora_lightning.commands.analyze import Request, Wanted, analyze
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.inject import adapted_layers
from tests.analysis.planted import factors, frame, write
from tests.lora.directories import edit_config, of_peft
from tests.tiny import make_bert

pytestmark = pytest.mark.filterwarnings("ignore::lora_lightning.AdapterWarning")
NAME = "encoder.layer.0.attention.self.query"
OTHER = "encoder.layer.1.attention.self.query"
SIDE = 32  # of the tiny BERT's attention


def told(adapters, folder, **options):
    request = Request(adapters=[str(a) for a in adapters], output_dir=folder, **{"plots": False, **options})
    analyze(request)
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

    found = told([tmp_path / "one", tmp_path / "two"], tmp_path / "out", wanted=Wanted(base_model=str(base)))
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


class Regression(nn.Module):
    """Two linear layers in a row and one beside them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.beside = nn.Linear(24, 20), nn.Linear(24, 18), nn.Linear(24, 22)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x), self.beside(x)], dim=-1)


def regression(seed=0):
    torch.manual_seed(seed)
    return Regression()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """LoRA of r=16, trained on what a change of rank 3 of each weight gives, twice."""
    folder = tmp_path_factory.mktemp("regression")
    rng = np.random.default_rng(3)
    target = regression()
    with torch.no_grad():
        for layer in (target.first, target.second, target.beside):
            m = layer.out_features
            change = (frame(rng, m, 3) * np.array([2.0, 1.5, 1.2])) @ frame(rng, 24, 3).T
            layer.weight += torch.tensor(change, dtype=torch.float32)
    torch.manual_seed(5)
    x = torch.randn(256, 24)
    data = TensorDataset(x, target(x).detach())
    found = []
    for seed in (0, 1):
        model = regression()
        torch.manual_seed(seed)
        config = LoRAConfig(r=16, alpha=16, target_modules=["first", "second", "beside"])
        optimizer = lambda params: torch.optim.Adam(params, lr=0.02)  # noqa: E731
        module = LoRAModule(model, Supervised(nn.MSELoss()), config, optimizer=optimizer)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = LoRATrainer(max_epochs=90, accelerator="cpu", default_root_dir=folder, **quiet)
        trainer.fit(module, DataLoader(data, batch_size=128))
        found.append(save_adapter(module.backbone, folder / f"seed{seed}"))
    return found, x, target


def test_truncation_keeps_the_planted_rank(trained, tmp_path):
    """The task's own rank in each layer, whatever the adapter had room for; and the outputs stay."""
    (directory, _), x, target = trained
    found = told([directory], tmp_path / "out", truncate=0.95)
    cut = found["truncation"]
    assert cut["ranks"] == {"beside": [16, 3], "first": [16, 3], "second": [16, 3]}
    assert all(layer["ranks"] == {"90%": 3, "95%": 3, "99%": 3} for layer in found["adapters"][0]["layers"])
    assert "name the run" in cut["cost"]["not_measured"]
    small, full = regression(), regression()
    load_adapter(small, tmp_path / "out" / "truncated")
    load_adapter(full, directory)
    assert all(layer.lora_A.shape[0] == 3 for _, layer in adapted_layers(small))
    size = (target(x) - regression()(x)).norm()
    assert (small(x) - full(x)).norm() < 0.05 * size
    assert (small(x) - target(x)).norm() < 0.05 * size
    theirs = peft.PeftModel.from_pretrained(regression(), tmp_path / "out" / "truncated")
    torch.testing.assert_close(theirs(x), small(x), rtol=1e-4, atol=1e-5)
    said = json.loads((tmp_path / "out" / "truncated" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["rank_pattern"]) == (3, 3, {})


def test_two_seeds_find_the_same_directions(trained, tmp_path):
    """What the task needs is shared; what is left of the draw of A is not."""
    directories, _, _ = trained
    found = told(directories, tmp_path / "out")
    for layer in found["pairs"][0]["layers"]:
        phi = np.array(layer["phi"])
        if layer["side"] in ("update_in", "update_out"):
            assert phi[2, 2] > 0.98
    assert {adapter["label"] for adapter in found["adapters"]} == {"seed0", "seed1"}


def test_an_adapter_of_pefts_own_and_ours_give_the_same(tmp_path):
    """The same tensors under PEFT's patterns and scale, saved by PEFT and by us."""
    patterns = {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 9}, "use_rslora": True}
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], **patterns}
    theirs = of_peft(tmp_path / "theirs", regression(), **chosen)
    ours = regression()
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    found = told([tmp_path / "theirs", tmp_path / "ours"], tmp_path / "out")
    one, two = ({**layer, "base": None} for adapter in found["adapters"] for layer in [layers_of(adapter)])
    for name in ("first", "second"):
        a, b = one[name], two[name]
        assert (a["r"], a["scale"]) == (b["r"], b["scale"])
        np.testing.assert_allclose(a["singular_values"], b["singular_values"], rtol=1e-8)
        state = {k: v.detach().double() for k, v in theirs.state_dict().items()}
        A, B = (state[f"base_model.model.{name}.lora_{f}.default.weight"] for f in "AB")
        scale = {"first": 6 / 2, "second": 9 / math.sqrt(2)}[name]
        dense = np.linalg.svd(scale * (B @ A).numpy(), compute_uv=False)[: a["r"]]
        np.testing.assert_allclose(a["singular_values"], dense, rtol=1e-7)
    for layer in found["pairs"][0]["layers"]:
        np.testing.assert_allclose(np.diag(layer["phi"]), 1.0, atol=1e-9)


def spoil_weights(change):
    def spoil(folder):
        file = folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file(dict(filter(None, (change(k, v) for k, v in tensors.items()))), file)

    return spoil


def tear(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


SPOILED = {
    "not a whole safetensors file": tear,
    "peft_type LORA": lambda folder: edit_config(folder, peft_type="LOHA"),
    "shape of rank 4": lambda folder: edit_config(folder, r=5),
    "--base_model": lambda folder: edit_config(folder, init_lora_weights="pissa"),
    f"no 'base_model.model.{NAME}.lora_B.weight'": spoil_weights(lambda k, v: (k, v) if "lora_A" in k else None),
    "must start with": spoil_weights(lambda k, v: (f"x.{k}", v)),
    "finite": spoil_weights(lambda k, v: (k, v * np.inf)),
    "no adapter's directory": shutil.rmtree,
}


def test_what_cannot_be_analysed_is_refused_in_one_line(trained, tmp_path):
    (good, _), _, _ = trained
    rng = np.random.default_rng(0)
    layers = {NAME: factors(rng, frame(rng, 8, 2), np.ones(2), frame(rng, 6, 2), 4, 1)}
    plain = write(tmp_path / "plain", layers, r=4, alpha=4)
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
        "above 0 and at most 1": {"truncate": 1.5},
        "takes one adapter": {"truncate": 0.5, "adapters": [str(good), str(plain)]},
        "no layer of one name": {"adapters": [str(good), str(plain)]},
        "needs an adapter": {"adapters": []},
        "no folder": {"wanted": Wanted(base_model=str(tmp_path / "nowhere"))},
        "layers": {"layers": "("},
        "holds other files": {"output_dir": plain},
    }
    for match, options in requests.items():
        with pytest.raises(LoRAError, match=match):
            analyze(Request(**{"adapters": [str(good)], "output_dir": tmp_path / "out", "plots": False, **options}))


def test_w0_of_another_base_is_refused(tmp_path):
    base = make_bert(tmp_path / "bert")
    model = huggingface(str(base), num_labels=2)
    inject(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "adapter", task_type="SEQ_CLS")
    other = make_bert(tmp_path / "other", seed=1)
    told([tmp_path / "adapter"], tmp_path / "fits", wanted=Wanted(base_model=str(base)))
    with pytest.raises(LoRAError, match="another base"):
        told([tmp_path / "adapter"], tmp_path / "out", wanted=Wanted(base_model=str(other)))
    allowed = Wanted(base_model=str(other), allow_other_base=True)
    (adapter,) = told([tmp_path / "adapter"], tmp_path / "out", wanted=allowed)["adapters"]
    assert adapter["layers"][0]["base"]["w0_norm"] > 0
    assert adapter["layers"][0]["base"]["amplification"] is None  # of an update that is zero
