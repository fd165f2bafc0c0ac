"""ONNX computes what PyTorch computes, at sizes that it was not exported with."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, merge
from lora_lightning.export import onnx as exporting
from lora_lightning.export.onnx import export_onnx
from lora_lightning.lora.errors import MergeError
from tests.lora.laws import stir
from tests.lora.test_families import BERT, FAMILIES, GROUPED


@pytest.fixture
def runtime():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="the extra [onnx] is not installed")
    return pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")


def merged(make, config=None):
    torch.manual_seed(0)
    model = make().eval()
    inject(model, LoRAConfig(r=2, **(config or {})))
    merge(stir(model))
    return model


def tokens(rows, length):
    ids = torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(rows):
    return {"x": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(rows))}


class Plain(nn.Module):
    """A module of one's own, with two outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, *, scale=1.0):
        h = torch.relu(self.first(x)) * scale
        return self.second(h), h


slow = pytest.mark.slow  # the exporter takes ten seconds for a model of any size
CONVS = {"target_modules": FAMILIES["timm resnet"][2]["target_modules"]}
CASES = {
    "bert": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT)),
        lambda: tokens(3, 9),
        lambda: tokens(5, 4),
    ),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), lambda: tokens(3, 9), lambda: tokens(1, 12)),
    "timm resnet": (FAMILIES["timm resnet"][0], lambda: images(2), lambda: images(5)),
    "a module of one's own": (Plain, lambda: {"x": torch.randn(1, 6), "scale": 2.0}, lambda: {"x": torch.randn(7, 6)}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=slow if c in ("llama", "timm resnet") else ()) for c in CASES])
def test_onnxruntime_computes_what_pytorch_computes(case, runtime, tmp_path):
    make, probe, other = CASES[case]
    model, config = merged(make, CONVS if "resnet" in case else None), getattr(make(), "config", None)
    keys = list(model.state_dict())
    report = export_onnx(model, probe(), tmp_path / "model.onnx")
    assert report.max_rel_diff <= 1e-5, "a tenth of the stated tolerance"
    assert all(axes[0] == "batch" for axes in report.inputs.values())
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]
    assert report.size == (tmp_path / "model.onnx").stat().st_size

    inputs = other()
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    fixed = {k: v for k, v in probe().items() if not isinstance(v, torch.Tensor)}
    with torch.no_grad():
        want = model(**inputs, **fixed)
    want = [want] if isinstance(want, torch.Tensor) else [want.logits] if config else list(want)
    for ours, theirs in zip(want, got, strict=config is None):
        assert float((ours - torch.from_numpy(theirs)).abs().max()) <= 1e-5 * float(ours.abs().max())
    assert list(model.state_dict()) == keys
    assert not config or model.config.use_cache == config.use_cache


def test_a_half_precision_model_is_written_in_float32(runtime, tmp_path):
    model = merged(Plain).bfloat16()
    report = export_onnx(model, {"x": torch.randn(4, 6).bfloat16()}, tmp_path / "model.onnx")
    assert report.max_rel_diff <= 1e-5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_difference_is_refused_and_leaves_nothing(runtime, tmp_path, monkeypatch):
    model = merged(Plain)
    export = exporting._export

    def exports_another(called, tensors, file):
        other = copy.deepcopy(called)
        with torch.no_grad():
            other.model.second.bias += 0.1
        export(other, tensors, file)

    monkeypatch.setattr(exporting, "_export", exports_another)
    with pytest.raises(MergeError, match="onnxruntime differs from PyTorch by"):
        export_onnx(model, {"x": torch.randn(4, 6)}, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else -x[:, :2]


def test_what_torch_cannot_express_is_one_error(runtime, tmp_path):
    with pytest.raises(LoRAError, match="torch cannot express Branching in ONNX"):
        export_onnx(Branching(), {"x": torch.randn(4, 6)}, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_adapted_model_is_refused(runtime, tmp_path):
    model = Plain()
    inject(model, LoRAConfig(r=2))
    with pytest.raises(LoRAError, match=r"merge\(model\) first"):
        export_onnx(model, {"x": torch.randn(4, 6)}, tmp_path / "model.onnx")


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoRAError, match=r'pip install "lora_lightning\[onnx\]"'):
        export_onnx(Plain(), {"x": torch.randn(4, 6)}, tmp_path / "model.onnx")


class Masked(Plain):
    """An output that is minus infinity where nothing may be chosen."""

    def forward(self, x):
        h = self.second(torch.relu(self.first(x)))
        return h.masked_fill(torch.tensor([False, True, False]), float("-inf"))


def test_equal_infinities_are_equal_and_others_are_not(runtime, tmp_path, monkeypatch):
    model = merged(Masked)
    assert export_onnx(model, {"x": torch.randn(4, 6)}, tmp_path / "model.onnx").max_rel_diff <= 1e-5
    run, called = exporting._session, exporting._Called(model, {})

    class Finite:
        def __init__(self, file):
            self.session = run(file)

        def run(self, *args):
            return [np.where(np.isinf(one), 0.0, one).astype("float32") for one in self.session.run(*args)]

    monkeypatch.setattr(exporting, "_session", Finite)
    with torch.no_grad():
        assert exporting._difference(called, {"x": torch.randn(4, 6)}, tmp_path / "model.onnx") == float("inf")
