"""Checkpoints of the real loralib, loaded here: the same outputs in float64."""

from __future__ import annotations

import copy
import warnings

import loralib
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning import load_adapter, load_loralib, merge, save_adapter
from lora_lightning.lora.errors import AdapterError, AdapterWarning
from lora_lightning.lora.inject import modules_of_kind
from lora_lightning.lora.layers import TrainedBias
from tests.factories import distance, hf
from tests.lora.directories import refused

R, ALPHA = 2, 5
OPTIONS = {"r": R, "alpha": ALPHA, "enable_lora": [True, False, True]}


class Net(nn.Module):
    def __init__(self, lora=None, **options):
        super().__init__()
        kind = lora or nn
        r = {"r": R, "lora_alpha": ALPHA} if lora else {}
        self.table = kind.Embedding(11, 12, **r)
        self.conv = kind.Conv2d(1, 6, kernel_size=3, padding=1, **r)
        if options.get("enable"):
            self.qkv = lora.MergedLinear(12, 36, enable_lora=options["enable"], **r)
        else:
            self.qkv = nn.Linear(12, 36)
        self.norm = nn.LayerNorm(12)
        self.out = kind.Linear(12, 8, **r)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.table(ids)
        x = self.conv(x[:, None]).mean(1)[..., :12]
        q, k, v = self.qkv(F.pad(x, (0, 12 - x.shape[-1]))).chunk(3, -1)
        return self.head(self.out(self.norm(q.softmax(-1) * k + v)))


IDS = torch.tensor([[0, 3, 5, 7], [1, 1, 9, 10]])


def plain():
    torch.manual_seed(4)
    return Net().double().requires_grad_(True)


def theirs(bias="none", enable=(True, False, True), train=True):
    """loralib's twin of `plain`, trained a little."""
    base = plain()
    torch.manual_seed(5)
    model = Net(loralib, enable=list(enable)).double()
    state = {k.replace("conv.", "conv.conv."): v for k, v in base.state_dict().items()}
    missing, strangers = model.load_state_dict(state, strict=False)
    assert not strangers
    assert all("lora_" in name for name in missing)
    loralib.mark_only_lora_as_trainable(model, bias)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train(train)


def write(tmp_path, model, bias="none", wrap=None, name="lora.pt", legacy=False, whole=False):
    state = model.state_dict() if whole else loralib.lora_state_dict(model, bias)
    if name.endswith(".safetensors"):  # with keys as DataParallel makes them
        safetensors.torch.save_file({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / name)
        return tmp_path / name
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    return tmp_path / name


def load(path, model=None, **options):
    model = plain() if model is None else model
    return model, load_loralib(model, path, **OPTIONS | options)


FORMS = {
    "plain": {},
    "legacy": {"legacy": True},
    "state_dict": {"wrap": "state_dict"},
    "model_state_dict, legacy": {"wrap": "model_state_dict", "legacy": True},
    "whole": {"whole": True},
    "safetensors": {"name": "lora.safetensors"},
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_loralibs(tmp_path, form):
    model = theirs()
    ours, report = load(write(tmp_path, model, **FORMS[form]), dropout=0.25)
    assert distance(plain()(IDS), model(IDS)) > 1e-3
    assert distance(ours.eval()(IDS), model(IDS)) < 1e-12
    assert [(row.module, row.dropout) for row in report.modules] == [(n, 0.25) for n in ("table", "conv", "qkv", "out")]
    again, merged, inside = plain(), copy.deepcopy(ours), plain()
    merge(merged)
    assert distance(merged(IDS), model(IDS)) < 1e-12
    load_adapter(again, save_adapter(ours, tmp_path / "peft"))
    load(tmp_path / FORMS[form].get("name", "lora.pt"), torch.compile(inside, backend="eager"))
    assert torch.equal(again.eval()(IDS), ours(IDS))
    assert torch.equal(inside(IDS), ours(IDS))


@pytest.mark.parametrize("flags", [(True, False, False), (False, True, True), (True, True, True), (False, False, True)])
def test_parts_of_a_merged_linear_are_slices(tmp_path, flags):
    model = theirs(enable=flags)
    ours, _ = load(write(tmp_path, model), enable_lora=list(flags))
    assert distance(ours(IDS), model(IDS)) < 1e-12
    assert ours.qkv.lora_settings.slices.taken == tuple(n for n, flag in zip("qkv", flags, strict=True) if flag)
    if all(flags):
        assert distance(load(tmp_path / "lora.pt", enable_lora=None)[0](IDS), model(IDS)) < 1e-12


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_come_along(tmp_path, bias):
    model = theirs(bias)
    ours, _ = load(write(tmp_path, model, bias))
    assert distance(ours(IDS), model(IDS)) < 1e-12
    assert {name for name, _ in modules_of_kind(ours, TrainedBias)} == (
        {"conv", "qkv", "out"} if bias == "lora_only" else {"conv", "qkv", "norm", "out", "head"}
    )


def test_a_trained_head_is_taken_by_name(tmp_path):
    model = theirs()
    with torch.no_grad():
        model.head.weight.add_(1)
    path = write(tmp_path, model, whole=True)
    with pytest.raises(AdapterError, match=r"1 weights in the checkpoint are not this model's: head.weight; .*modules"):
        load(path)
    ours, report = load(path, modules_to_save=["head"])
    assert distance(ours(IDS), model(IDS)) < 1e-12
    assert report.saved.keys() == {"head"}


def test_a_state_saved_in_eval_mode_is_refused_with_the_reason_and_its_factors_are_good(tmp_path):
    model = theirs()
    wanted = model(IDS)
    path = write(tmp_path, model.eval(), whole=True)
    with pytest.raises(AdapterError, match=r"4 weights .*saved in eval\(\) mode.*allow_other_base=True"):
        load(path)
    ours, _ = load(path, allow_other_base=True)
    assert distance(ours(IDS), wanted) < 1e-12


@pytest.mark.parametrize(
    ("channels", "out", "k", "r"), [(3, 20, 3, 1), (3, 20, 2, 2), (2, 4, 3, 2), (1, 30, 5, 1), (4, 8, 1, 3)]
)
def test_convolutions_of_any_rank_and_size_are_the_same_update(tmp_path, channels, out, k, r):
    torch.manual_seed(6)
    options = {"stride": 2, "padding": 1, "bias": False}
    model = nn.Sequential(loralib.Conv2d(channels, out, k, r=r, lora_alpha=3, **options)).double()
    nn.init.normal_(model[0].lora_B)
    ours = nn.Sequential(nn.Conv2d(channels, out, k, **options)).double()
    ours[0].weight.data.copy_(model[0].conv.weight)
    x = torch.randn(2, channels, 9, 9, dtype=torch.float64)
    base = ours(x)
    load_loralib(ours, write(tmp_path, model), r=r, alpha=3)
    assert distance(ours(x), model(x)) < 1e-12
    assert distance(base, model(x)) > 1e-2
    assert ours[0].lora_A.shape[0] == r * k * k


def test_gpt2s_fused_attention_as_in_the_papers_own_code(tmp_path):
    ours = hf("GPT2LMHeadModel", "GPT2Config", n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16)
    ours = ours.double().eval()
    torch.manual_seed(7)
    model = copy.deepcopy(ours)
    options = {"enable_lora": [True, False, True], "fan_in_fan_out": True, "merge_weights": False}
    for block in model.transformer.h:
        fused = loralib.MergedLinear(8, 24, r=4, lora_alpha=32, **options).double()
        fused.weight.data, fused.bias.data = block.attn.c_attn.weight.data, block.attn.c_attn.bias.data
        nn.init.normal_(fused.lora_B)
        block.attn.c_attn = fused
    path = write(tmp_path, model, wrap="model_state_dict", whole=True)
    load_loralib(ours, path, r=4, alpha=32, enable_lora=[True, False, True])
    ids = torch.arange(1, 7)[None]
    assert distance(ours(ids).logits, model(ids).logits) < 1e-12


REFUSALS = {
    "r": (lambda s: s, {"r": 4}, r"'table': lora_B says r=2, expected the r that was given, 4"),
    "no r": (lambda s: s, {"r": 0}, "r must be a whole number of at least 1, got 0"),
    "alpha": (lambda s: s, {"alpha": 0}, "alpha must be a finite number above 0"),
    "which parts": (lambda s: s, {"enable_lora": None}, r"'qkv' is a MergedLinear with 2 of 3 parts adapted, and the"),
    "other parts": (lambda s: s, {"enable_lora": [True, False]}, r"enable_lora: 'qkv' has 2 of 3 parts"),
    "parts by names": (lambda s: s, {"enable_lora": {"qkv": [True]}}, "enable_lora is one list for every MergedLinear"),
    "missing": (lambda s: s.pop("out.lora_B"), {}, r"lacks 1 tensors: out.lora_B"),
    "half of the biases": (lambda s: s.update({"out.bias": torch.ones(8)}), {}, r"lacks 1 tensors: qkv.bias"),
    "no head": (lambda s: s, {"modules_to_save": ["head"]}, r"lacks 2 tensors: head.weight, head.bias"),
    "surplus": (lambda s: s.update({"outs.weight": torch.ones(2)}), {}, r"1 keys left over: outs.weight; did you mean"),
    "unknown": (lambda s: s.update({"x.lora_A": torch.ones(2, 2)}), {}, "the model has no module 'x'"),
    "shape": (lambda s: s.update({"out.lora_A": torch.ones(2, 5)}), {}, r"'out.lora_A' has shape \(2, 5\), expected"),
    "flat": (lambda s: s.update({"out.lora_A": torch.ones(2)}), {}, "must be matrices"),
    "nothing": (lambda s: s.clear(), {}, "no key that ends in lora_A"),
    "PEFT's": (lambda s: s.update({"out.lora_A.weight": torch.ones(2)}), {}, "is PEFT's, not loralib's"),
    "nan": (lambda s: s["out.lora_A"][0].fill_(float("nan")), {}, "not finite, in 'out.lora_A'"),
    "infinity": (lambda s: s["qkv.lora_B"][0].fill_(float("inf")), {}, "not finite, in 'qkv.lora_B'"),
    "nan in a head": (
        lambda s: s.update({"head.weight": torch.full((3, 8), float("nan")), "head.bias": torch.ones(3)}),
        {"modules_to_save": ["head"]},
        "not finite, in 'head.weight'",
    ),
    "a norm": (lambda s: s.update({"norm.lora_A": torch.ones(2, 2), "norm.lora_B": torch.ones(2, 2)}), {}, "no kind"),
}


def test_what_could_not_be_checked_of_the_base_is_said_as_load_adapter_says_it(tmp_path):
    model = theirs()
    part = model.state_dict()
    del part["norm.weight"]
    torch.save(part, tmp_path / "part.pt")
    for path in (write(tmp_path, model), tmp_path / "part.pt"):
        with pytest.warns(AdapterWarning, match="^this adapter notes no fingerprint of its base") as said:
            load(path)
        assert {warning.filename for warning in said} == {__file__}, "a notice points at the caller"
    other, whole = plain(), write(tmp_path, model, whole=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(whole)
    with torch.no_grad():
        other.norm.weight.add_(1)
    with pytest.warns(AdapterWarning, match="^allow_other_base: 1 weights in the .* this model's: norm.weight. Its"):
        load(whole, other, allow_other_base=True)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_and_leaves_the_model_plain(tmp_path, name):
    change, options, match = REFUSALS[name]
    state = loralib.lora_state_dict(theirs())
    change(state)
    torch.save(state, tmp_path / "lora.pt")
    refused(tmp_path / "lora.pt", match, plain(), load=load_loralib, **OPTIONS | options)


LAYERS = {
    "Conv1d": (nn.Conv1d(2, 2, 3), (6, 6), r"'0' is a Conv1d: in loralib only Conv2d can run"),
    "groups": (nn.Conv2d(2, 2, 3, groups=2), (6, 6), "2 groups: .*no form here"),
    "oblong": (nn.Conv2d(2, 2, (3, 5)), (6, 6), r"kernel \(3, 5\)"),
    "max_norm": (nn.Embedding(5, 4, max_norm=1.0), (2, 5), r"'0' has max_norm"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_loralib_cannot_run_are_refused_by_name(tmp_path, name):
    layer, shape, match = LAYERS[name]
    state = {"0.lora_A": torch.ones(shape), "0.lora_B": torch.ones(4 if name == "max_norm" else 6, shape[0])}
    torch.save(state, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", match, nn.Sequential(layer), load=load_loralib, r=2, alpha=4)
