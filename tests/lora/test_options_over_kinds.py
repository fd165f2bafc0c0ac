"""The options on the kinds of layer beside `nn.Linear`: each works, with PEFT as witness, or is refused by name."""

import copy
from functools import partial

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import inject, load_adapter, merge, save_adapter
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.tensors import base_tensors
from tests.lora.laws import check_laws, check_peft_opens_ours, check_we_open_pefts, config, dtypes, relative, stir

CONVS = {
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2),
    "1d circular": lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"),
    "2d": lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0)),
    "2d reflect": lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), padding_mode="reflect"),
    "2d grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "3d": lambda: nn.Conv3d(4, 6, 2, padding=1),
}


def conv(which):
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), CONVS[which]())


def run_conv(model, which):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *[6] * int(which[0]), generator=generator, dtype=torch.float64)
    return model(x.to(next(model.parameters()).dtype))


def embedding(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6, **kwargs), nn.Linear(6, 3))


def run_embedding(model):
    return model(torch.tensor([[1, 2, 3, 0], [8, 8, 5, 2]]))


def conv1d():
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(12, 6), nn.Tanh(), Conv1D(5, 12))


def run_conv1d(model):
    generator = torch.Generator().manual_seed(1)
    return model(torch.randn(3, 6, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype))


MODELS = {
    **{f"Conv{which}": (partial(conv, which), partial(run_conv, which=which), ["1"]) for which in CONVS},
    "Embedding": (embedding, run_embedding, ["0"]),
    "Embedding with padding": (lambda: embedding(padding_idx=0, scale_grad_by_freq=True), run_embedding, ["0"]),
    "Conv1D": (conv1d, run_conv1d, ["0", "2"]),
}


@dtypes
@pytest.mark.parametrize("name", MODELS)
def test_laws_of_dora(name, dtype, tmp_path):
    make, run, targets = MODELS[name]
    check_laws(make, run, config(target_modules=targets, use_dora=True), dtype, tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "Conv1D"])
def test_laws_of_trained_biases(name, bias, tmp_path):
    make, run, targets = MODELS[name]
    check_laws(make, run, config(target_modules=targets, bias=bias, use_dora=True), torch.float64, tmp_path)


# PEFT's A knows neither padding modes nor dilation nor groups.
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Embedding with padding", "Conv1D"])
def test_peft_opens_our_dora_and_we_open_pefts(name, tmp_path):
    make, run, targets = MODELS[name]
    check_peft_opens_ours(make, run, config(target_modules=targets, use_dora=True), tmp_path)
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets, use_dora=True, fan_in_fan_out=name == "Conv1D")
    check_we_open_pefts(make, run, theirs, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "pissa_niter_4"])
def test_a_start_of_conv1d_leaves_w0_and_the_output_and_is_exported_at_twice_the_rank(init, tmp_path):
    plain = conv1d().double()
    model = copy.deepcopy(plain)
    inject(model, config(target_modules=["0", "2"], init=init))
    torch.testing.assert_close(run_conv1d(model), run_conv1d(plain), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in base_tensors(model).items())
    if init in {"pissa", "olora"}:  # r directions of W0 as (out, in)
        W, s = plain[0].weight.T, 1.5
        best = torch.linalg.svd(W)
        wanted = best.U[:, :2] @ torch.diag(best.S[:2]) @ best.Vh[:2]
        if init == "olora":
            Q, R = torch.linalg.qr(W)
            wanted, s = Q[:, :2] @ R[:2], 1.0
        torch.testing.assert_close(s * model[0].lora_B0 @ model[0].lora_A0, wanted)
    stir(model)
    again, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    load_adapter(again, save_adapter(model, tmp_path))
    assert again[0].lora_A.shape == (4, 6)
    assert relative(run_conv1d(again), run_conv1d(model)) < 1e-12
    theirs = peft.PeftModel.from_pretrained(theirs.float(), tmp_path).eval()
    assert relative(theirs(torch.ones(1, 6)), model(torch.ones(1, 6).double())) < 1e-5
    out = run_conv1d(model)
    merge(model)
    assert relative(run_conv1d(model), out) < 1e-12


class Attended(nn.Module):
    """An attention and what surrounds it, each with biases."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x.mT).mT
        return self.up(self.norm(self.attention(x, x, x, need_weights=False)[0]))


def attended():
    torch.manual_seed(0)
    return Attended()


def run_attended(model):
    generator = torch.Generator().manual_seed(1)
    return model(torch.randn(2, 3, 8, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype))


@pytest.mark.parametrize("targets", [["conv", "attention"], ["attention.out_proj", "up"], ["up"]])
def test_every_bias_trains_beside_every_kind(targets, tmp_path):
    chosen = config(target_modules=targets, bias="all", dropout_pattern={targets[-1]: 0.25} if "up" in targets else {})
    check_laws(attended, run_attended, chosen, torch.float64, tmp_path)


def test_peft_opens_biases_beside_an_attention(tmp_path):
    check_peft_opens_ours(attended, run_attended, config(target_modules=["conv", "attention"], bias="all"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["attention"], "use_dora": True}, "use_dora: 'attention', a MultiheadAttention, has no"),
        ({"target_modules": ["attention.out_proj"], "lora_bias": True}, "'attention.out_proj', .*, takes no bias on B"),
        ({"target_modules": ["conv"], "init": "pissa"}, "made for linear layers; 'conv' is a Conv1d"),
        ({"target_modules": ["attention"], "init": "olora"}, "made for linear layers; 'attention' is a Multihead"),
        ({"target_modules": [], "target_parameters": ["up.weight"], "use_dora": True}, "'up.weight', a bare parameter"),
        ({"target_modules": [], "target_parameters": ["up.weight"], "init": "pissa"}, "'up.weight' is a bare param"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_option_that_a_kind_cannot_take_is_refused_by_name(fields, message):
    with pytest.raises(TargetError, match=message):
        inject(attended(), config(**fields))


@pytest.mark.parametrize(
    "option", [{"use_dora": True}, {"lora_bias": True}, {"init": "pissa"}], ids=lambda o: next(iter(o))
)
def test_an_option_on_chosen_parts_is_refused_by_name(option):
    spec = {"up": {"of": ["a", "b"], "take": ["b"]}}
    with pytest.raises(TargetError, match=f"{next(iter(option))}.* has no form for chosen slices yet, and 'up' has"):
        inject(attended(), config(target_modules=["up"], slices=spec, **option))


def test_dora_beside_max_norm_is_refused():
    with pytest.raises(TargetError, match="max_norm, which bounds each row, and DoRA rescales each column"):
        inject(embedding(max_norm=1.0), config(target_modules=["0"], use_dora=True))


class Each(nn.Module):
    """An embedding, a convolution, a norm and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 8, 1)
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.up(self.norm(self.conv(self.embed(x).mT).mT))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"bias": "all", "use_dora": True},
        {"lora_bias": True, "target_modules": ["up"]},
        {"init_lora_weights": "pissa", "target_modules": ["up"]},
        {"trainable_token_indices": {"embed": [3, 1]}, "target_modules": ["conv"]},
        {"target_parameters": ["conv.weight"], "target_modules": ["up"]},
        {"modules_to_save": ["up"], "bias": "all", "target_modules": ["embed", "conv"]},
    ],
    ids=str,
)
def test_a_directory_of_pefts_with_any_option_loads_and_goes_back(fields, tmp_path):
    plain, x = Each().eval(), torch.tensor([[1, 2, 3]])
    chosen = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["embed", "conv", "up"], **fields})
    theirs = peft.get_peft_model(copy.deepcopy(plain), chosen).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(plain)
    load_adapter(ours, tmp_path / "theirs")
    assert relative(ours(x), theirs(x)) < 1e-6
    assert relative(plain(x), theirs(x)) > 1e-3
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), save_adapter(ours, tmp_path / "ours")).eval()
    assert relative(back(x), theirs(x)) < 1e-6
