"""Every kind of adapted layer: what is read from files and from a model is the update that a merge adds."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import LoRAConfig, inject, load_adapter, save_adapter
from lora_lightning.analysis.adapters import Adapter, read_factors
from lora_lightning.analysis.base_weights import Weights
from lora_lightning.analysis.measures import common_rank, measure_adapter
from lora_lightning.analysis.spectra import base_matrices, update_pairs
from lora_lightning.analysis.truncation import truncate
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers
from tests.lora.directories import edit_config, of_peft
from tests.lora.laws import relative, stir

pytestmark = pytest.mark.filterwarnings("ignore::lora_lightning.AdapterWarning")


class Experts(nn.Module):
    """Two stacks, one of which lies turned in some models."""

    def __init__(self, turned=False):
        super().__init__()
        self.is_transposed = turned
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 10) if turned else torch.randn(3, 10, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 10, 8) if turned else torch.randn(3, 8, 10))


class Holder(nn.Module):
    """A name for the layer, as a model has it."""

    def __init__(self, layer):
        super().__init__()
        self.blocks = nn.ModuleList([layer])


FUSED = {"blocks.0": {"of": ["q", "k", "v"], "take": ["q", "v"]}}
STACKS = ["blocks.0.gate_up_proj", "blocks.0.down_proj"]
EVERY = {"target_modules": r"blocks\.0(\.out_proj)?"}
KINDS = {
    "linear": (lambda: nn.Linear(12, 9), EVERY),
    "conv1d_of_transformers": (lambda: Conv1D(9, 12), EVERY),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), EVERY),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), EVERY),
    "conv_with_groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), EVERY),
    "embedding": (lambda: nn.Embedding(20, 8), EVERY),
    "parts": (lambda: nn.Linear(12, 18), {**EVERY, "slices": FUSED}),
    "attention": (lambda: nn.MultiheadAttention(12, 2), EVERY),
    "attention_in": (lambda: nn.MultiheadAttention(12, 2), {"target_modules": ["blocks.0"]}),
    "attention_out": (lambda: nn.MultiheadAttention(12, 2), {"target_modules": ["out_proj"]}),
    "stacks": (Experts, {"target_modules": [], "target_parameters": STACKS}),
    "turned_stacks": (lambda: Experts(True), {"target_modules": [], "target_parameters": STACKS}),
    "matrix": (lambda: nn.Linear(12, 9), {"target_modules": [], "target_parameters": ["blocks.0.weight"]}),
    "dora": (lambda: nn.Linear(12, 9), {**EVERY, "use_dora": True}),
    "rslora": (lambda: nn.Linear(12, 9), {**EVERY, "use_rslora": True}),
    "pissa": (lambda: nn.Linear(12, 9), {**EVERY, "init": "pissa"}),
    "lora_bias": (lambda: nn.Linear(12, 9), {**EVERY, "lora_bias": True}),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def made(kind, *, r=4, adapted=True):
    torch.manual_seed(0)
    layer, options = KINDS[kind]
    model = Holder(layer()).double().eval()
    if adapted:
        inject(model, LoRAConfig(r=r, alpha=3.0, **options))
        stir(model)
    return model


def opened(directory, label="adapter"):
    layers, tensors = read_factors(files := AdapterFiles.read(Path(directory)))
    return Adapter(label=label, source=str(directory), factors=layers, files=files, tensors=tensors)


def weight_deltas(layer):
    """What a merge adds to each weight of a layer, whole."""
    weights, deltas = layer.adapted_parameters(), {}
    for name, place, _, delta in layer.updates():
        whole = deltas.setdefault(name, torch.zeros(weights[name].shape, dtype=delta.dtype))
        whole[place] = delta
    return deltas


def dense(layer):
    """By torch's own layout of each kind, the matrices of `s (B A - B0 A0)` that a merge would add."""
    dora = layer.lora_magnitude_vector is not None
    matrices = []
    for found in [layer.delta_weight()] if dora else weight_deltas(layer).values():
        delta = found.detach().double()
        if layer.kind in ("Conv1D", "Embedding"):
            matrices.append(delta.T)
        elif layer.kind == "Parameter" and delta.dim() == 3:
            matrices += delta
        else:
            matrices += delta.flatten(1).chunk(getattr(layer, "groups", 1))
    return matrices


def inside(update, W0):
    """||U^T W0 V||_F by a dense decomposition."""
    U, S, Vh = torch.linalg.svd(update)
    q = int((1e-12 * S[0] < S).sum())
    return float(torch.linalg.norm(U[:, :q].T @ W0 @ Vh[:q].T))


def singular_values(matrices):
    S = torch.cat([torch.linalg.svdvals(m) for m in matrices]).sort(descending=True).values
    return S[1e-12 * S[0] < S]


@kinds
def test_what_files_and_model_hold_is_what_a_merge_adds(kind, tmp_path):
    model = made(kind)
    save_adapter(model, tmp_path / "adapter")
    read = {layer.name: layer for layer in opened(tmp_path / "adapter").factors}
    told = {m.name: m for m in measure_adapter(opened(tmp_path / "adapter"), Weights(model)).layers}
    layers = {layer.lora_name(path): layer for path, layer in adapted_layers(model)}
    assert read.keys() == layers.keys()
    for name, layer in layers.items():
        want = singular_values(dense(layer))
        found = torch.tensor(told[name].singular_values, dtype=torch.float64)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
        W0 = [base.double() for base in base_matrices(layer)]
        pairs = [(layer.lora_settings.scale * (B @ A)).double() for A, B in update_pairs(layer)]
        assert [m.shape for m in W0] == [p.shape for p in pairs]
        torch.testing.assert_close(singular_values(pairs), want, rtol=1e-9, atol=1e-12)
        weights = layer.adapted_parameters().values()
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in weights))
        assert math.isclose(told[name].base.w0_norm, norm, rel_tol=1e-12)
        found = Weights(made(kind, adapted=False)).of(read[name])
        assert all(torch.equal(a, b) for a, b in zip(found, base_matrices(layer), strict=True))
        shared = sum(inside(p, w) ** 2 for p, w in zip(pairs, W0, strict=True))
        amplification = math.sqrt(sum(float(p.square().sum()) for p in pairs) / shared)
        assert math.isclose(told[name].base.amplification, amplification, rel_tol=1e-9)


BY_PEFT = ["linear", "conv2d", "embedding", "parts", "dora", "rslora", "pissa", "stacks", "lora_bias"]


@kinds
def test_a_truncated_adapter_loads_and_holds_its_share_and_no_more_than_it_must(kind, tmp_path):
    model, share = made(kind), 0.9
    save_adapter(model, tmp_path / "adapter")
    scales = {f.name: f.scale for f in opened(tmp_path / "adapter").factors}
    told = truncate(opened(tmp_path / "adapter"), share, tmp_path / "small")
    again = made(kind, adapted=False)
    load_adapter(again, tmp_path / "small")
    before = {layer.lora_name(path): dense(layer) for path, layer in adapted_layers(model)}
    for path, layer in adapted_layers(again):
        name = layer.lora_name(path)
        lost = sum(float((a - b).square().sum()) for a, b in zip(dense(layer), before[name], strict=True))
        whole = sum(float(a.square().sum()) for a in before[name])
        assert lost <= (1 - share) * whole * (1 + 1e-9)
        assert math.isclose(math.sqrt(lost / whole), told.errors[name], rel_tol=1e-6, abs_tol=1e-7)
        assert layer.lora_settings.r == told.ranks[name][1]
        assert math.isclose(layer.lora_settings.scale, scales[name])
    untouched = adapter_tensors(model)
    for key, tensor in adapter_tensors(again).items():
        if "lora_A" not in key and not key.endswith("lora_B"):
            assert torch.equal(tensor, untouched[key]), key
    assert {f.name: f.r for f in opened(tmp_path / "small").factors} == {n: r for n, (_, r) in told.ranks.items()}
    for layer in opened(tmp_path / "adapter").factors:  # by dense spectra of what keeps a rank of its own
        rank = common_rank(layer, share) // layer.groups
        squares = [torch.linalg.svdvals(m).square() for m in before[layer.name]]
        whole = sum(float(s.sum()) for s in squares)
        assert sum(float(s[:rank].sum()) for s in squares) >= share * whole * (1 - 1e-12)
        assert rank == 1 or sum(float(s[: rank - 1].sum()) for s in squares) < share * whole
    if kind in BY_PEFT:
        bare = made(kind, adapted=False)
        theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "small", autocast_adapter_dtype=False)
        merged = theirs.merge_and_unload()
        for path, layer in adapted_layers(again):
            for name, delta in weight_deltas(layer).items():
                W0 = layer.adapted_parameters()[name]
                owner = path if layer.kind != "Parameter" else path.rpartition(".")[0]
                assert relative(merged.get_parameter(f"{owner}.{name}"), W0 + delta) < 1e-9


def test_an_adapter_that_peft_wrote_has_pefts_own_update(tmp_path):
    patterns = {"rank_pattern": {"1": 2}, "alpha_pattern": {"1": 9}, "use_rslora": True}
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    theirs = of_peft(tmp_path / "theirs", model, r=4, lora_alpha=6, target_modules=["0", "1"], **patterns)
    state = {key: tensor.detach().double() for key, tensor in theirs.state_dict().items()}
    for layer in measure_adapter(opened(tmp_path / "theirs"), None).layers:
        A, B = (state[f"base_model.model.{layer.name}.lora_{f}.default.weight"] for f in "AB")
        r, scale = {"0": (4, 6 / 2), "1": (2, 9 / math.sqrt(2))}[layer.name]
        assert (layer.r, layer.scale) == (r, pytest.approx(scale))
        want = torch.linalg.svdvals(scale * B @ A)[:r]
        torch.testing.assert_close(torch.tensor(layer.singular_values).double(), want, rtol=1e-6, atol=0)


def test_stacks_are_told_apart_whatever_order_the_config_has(tmp_path):
    """PEFT writes target_parameters in the order of a set, another each time."""
    of_peft(tmp_path / "adapter", Holder(Experts()), r=4, target_modules=[], target_parameters=STACKS)
    for order in (STACKS, STACKS[::-1]):
        edit_config(tmp_path / "adapter", target_parameters=order)
        shapes = {layer.name: layer.shape for layer in opened(tmp_path / "adapter").factors}
        assert shapes == {"blocks.0.gate_up_proj": (10, 8), "blocks.0.down_proj": (8, 10)}
    inject(model := Experts(), LoRAConfig(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]))
    save_adapter(model, tmp_path / "whole")  # of a model that holds the stacks itself
    assert {layer.name for layer in opened(tmp_path / "whole").factors} == {"gate_up_proj", "down_proj"}


def test_parameters_of_unknown_order_ask_for_the_model(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.right, self.left = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5, 3))

    model = Holder(Two())
    inject(model, LoRAConfig(r=2, target_modules=[], target_parameters=["right", "left"]))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"left, right, whose tensors only its model tells apart.*--base_model"):
        opened(tmp_path / "adapter")
    layers, _ = read_factors(AdapterFiles.read(tmp_path / "adapter"), modules=dict(Holder(Two()).named_modules()))
    assert {layer.name: layer.shape for layer in layers} == {"blocks.0.right": (6, 4), "blocks.0.left": (5, 3)}


def test_an_attention_of_three_weights_is_refused_by_name(tmp_path):
    model = Holder(nn.MultiheadAttention(12, 2, kdim=8, vdim=6)).eval()
    inject(model, LoRAConfig(r=2, target_modules=["blocks.0"]))
    save_adapter(stir(model), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="kdim or vdim"):
        opened(tmp_path / "adapter")
    ((_, layer),) = adapted_layers(model)
    assert [tuple(W0.shape) for W0 in base_matrices(layer)] == [tuple((B @ A).shape) for A, B in update_pairs(layer)]
