"""`nn.MultiheadAttention`: the in-projection, whole or in parts, and the out-projection."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning import disabled, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from tests.lora.laws import (
    check_laws,
    check_meta,
    check_peft_opens_ours,
    check_we_open_pefts,
    config,
    dtypes,
    relative,
    stir,
)

WIDTH, HEADS = 8, 2


class Attention(nn.Module):
    """Gives self-attention, or attention to something else, in one tensor with its weights."""

    def __init__(self, cross=False, call=None, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **kwargs)
        for parameter in self.attn.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.cross, self.call = cross, call or {}

    def forward(self, q, k, v):
        out, weights = self.attn(q, k if self.cross else q, v if self.cross else q, **self.call)
        return torch.cat([out.flatten(), torch.zeros(0).to(out) if weights is None else weights.flatten()])


def inputs(dtype, kdim=WIDTH, vdim=WIDTH, same=True):
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4, WIDTH), (3 if same else 5, 4, kdim), (3 if same else 5, 4, vdim)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def run_with(**kwargs):
    def run(model):
        q, k, v = inputs(next(model.parameters()).dtype, **kwargs)
        return model(q, k if kwargs else q, v if kwargs else q)

    return run


CASES = {
    "self": ({}, {}),
    "batch_first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {}),
    "bias_kv": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "cross": ({"cross": True}, {"same": False}),
    "unfused": ({"cross": True, "kdim": 5, "vdim": 6}, {"kdim": 5, "vdim": 6, "same": False}),
    "no weights": ({"call": {"need_weights": False}}, {}),
    "each head's weights": ({"call": {"average_attn_weights": False}}, {}),
}
TARGETS = {"both": ["attn", "out_proj"], "in": ["attn"], "out": ["out_proj"]}


@dtypes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("targets", TARGETS)
def test_laws(case, targets, dtype, tmp_path):
    kwargs, given = CASES[case]
    run = run_with(**given)
    with torch.enable_grad():
        check_laws(lambda: Attention(**kwargs), run, config(target_modules=TARGETS[targets]), dtype, tmp_path)


@dtypes
@pytest.mark.parametrize("parts", [["q", "v"], ["k"], ["v", "k", "q"]])
@pytest.mark.parametrize("case", ["self", "cross", "unfused"])
def test_laws_of_chosen_projections(case, parts, dtype, tmp_path):
    kwargs, given = CASES[case]
    chosen = config(target_modules=["attn"], slices={"attn": parts})
    report = check_laws(lambda: Attention(**kwargs), run_with(**given), chosen, dtype, tmp_path)
    sizes = {"q": WIDTH, "k": given.get("kdim", WIDTH), "v": given.get("vdim", WIDTH)}
    assert report.trainable == sum(2 * (sizes[p] + WIDTH) for p in parts)


def dense(model, part):
    """`s B A` of one part, from the tensors alone."""
    layer = model.attn
    i = "qkv".index(part)
    if layer.lora_settings.slices is None:
        return 1.5 * layer.lora_B[i * WIDTH : (i + 1) * WIDTH] @ layer.lora_A
    at = layer.lora_settings.slices.taken.index(part)
    return 1.5 * layer.lora_B[at * WIDTH : (at + 1) * WIDTH] @ layer.lora_A[:, at * WIDTH : (at + 1) * WIDTH]


def masks(which, n=4, length=3, source=3):
    causal = torch.triu(torch.full((length, source), float("-inf"), dtype=torch.float64), 1)
    padding = torch.zeros(n, source, dtype=torch.bool)
    padding[1, -1] = True
    per_head = torch.randn(n * HEADS, length, source, dtype=torch.float64)
    return {
        "none": {},
        "float": {"attn_mask": causal},
        "bool": {"attn_mask": causal.isinf()},
        "per head": {"attn_mask": per_head},
        "padding": {"key_padding_mask": padding},
        "both": {"key_padding_mask": padding, "attn_mask": causal.isinf()},
        "causal": {"attn_mask": causal, "is_causal": True},
    }[which]


@pytest.mark.parametrize("mask", ["none", "float", "bool", "per head", "padding", "both", "causal"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("slices", [None, ["q", "v"]])
def test_output_and_gradients_are_torchs_with_the_dense_update(mask, need_weights, slices):
    """Against torch's own function on W0 + s B A: each update counts once."""
    call = {**masks(mask), "need_weights": need_weights}
    model = Attention(call=call, add_bias_kv=True, add_zero_attn=True).double()
    inject(model, config(target_modules=["attn", "out_proj"], slices={"attn": slices} if slices else {}))
    stir(model)
    q, k, v = inputs(torch.float64)
    got = model(q, k, v)
    attn = model.attn
    factors = [attn.lora_A, attn.lora_B, attn.out_proj.lora_A, attn.out_proj.lora_B]
    chosen = slices or ["q", "k", "v"]
    zero = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    delta = torch.cat([dense(model, part) if part in chosen else zero for part in "qkv"])
    out_delta = 1.5 * attn.out_proj.lora_B @ attn.out_proj.lora_A
    W0, out_W0 = attn._parameters["in_proj_weight"], attn.out_proj._parameters["weight"]
    args = (q, q, q, WIDTH, HEADS, W0 + delta, attn.in_proj_bias, attn.bias_k, attn.bias_v, True, 0.0)
    want = F.multi_head_attention_forward(*args, out_W0 + out_delta, attn.out_proj.bias, **call)
    want = torch.cat([w.flatten() for w in want if w is not None])
    assert relative(got, want) < 1e-12
    weights = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * weights).sum(), factors)
    for got_grad, want_grad in zip(got_grads, torch.autograd.grad((want * weights).sum(), factors), strict=True):
        assert relative(got_grad, want_grad) < 1e-11


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input(batch_first):
    model = Attention(batch_first=batch_first)
    plain = copy.deepcopy(model)
    inject(model, config())
    x = torch.randn(3, WIDTH)
    assert torch.equal(model(x, x, x), plain(x, x, x))


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_attentions_own_dropout_is_torchs_in_training(need_weights):
    model = Attention(dropout=0.4, call={"need_weights": need_weights}).requires_grad_(False).train()
    plain = copy.deepcopy(model)
    inject(model, config())
    q, k, v = inputs(torch.float32)
    torch.manual_seed(3)
    want = plain(q, k, v)
    torch.manual_seed(3)
    assert torch.equal(model(q, k, v), want)


@pytest.mark.parametrize("only", ["attn", "out_proj"])
def test_dropout_is_refused_for_weights_that_are_read(only):
    with pytest.raises(TargetError, match=f"'attn.*{only.removeprefix('attn')}'.*dropout_pattern"):
        inject(Attention(), config(dropout=0.5, target_modules=[only]))
    inject(Attention(), config(dropout=0.5, target_modules=[only], dropout_pattern={only: 0.0}))


def test_all_linear_says_that_the_dropout_of_the_other_layers_is_not_theirs():
    report = inject(
        nn.Sequential(nn.TransformerEncoderLayer(WIDTH, HEADS, 16), nn.Linear(WIDTH, 2)), config(dropout=0.5)
    )
    assert {row.module: row.dropout for row in report.modules} == {
        "0.self_attn": 0.0,
        "0.self_attn.out_proj": 0.0,
        "0.linear1": 0.5,
        "0.linear2": 0.5,
    }


def test_an_adapter_that_names_a_dropout_for_all_layers_is_loaded(tmp_path):
    theirs = peft.get_peft_model(Attention(), peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["attn"]))
    theirs.save_pretrained(tmp_path)
    load_adapter(Attention(), tmp_path)


def test_all_linear_adapts_both_projections():
    report = inject(nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 16), 2), config())
    names = [row.module.removeprefix("layers.0.") for row in report.modules[:4]]
    assert names == ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    assert not report.skipped


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_encoder_in_eval_gives_the_adapted_output(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    for targets in ("all-linear", ["self_attn"], ["out_proj"]):
        adapted = copy.deepcopy(model)
        inject(adapted, config(target_modules=targets))
        stir(adapted)
        x, padding = torch.randn(2, 5, WIDTH), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with torch.no_grad():
            quick = adapted(x, src_key_padding_mask=padding)
        slow = adapted(x, src_key_padding_mask=padding)
        assert torch.allclose(quick[~padding], slow[~padding], atol=1e-6)  # torch puts zeros in padding in one of them
        assert relative(quick, model(x, src_key_padding_mask=padding)) > 1e-3
        merge(adapted)
        merged = adapted(x, src_key_padding_mask=padding)
        assert relative(merged[~padding], slow[~padding]) < 1e-5


def test_w0_of_a_bf16_model_is_bit_identical_after_500_adamw_steps():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True).to(torch.bfloat16)
    inject(model, config())
    before = fingerprint(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(2, 3, WIDTH).to(torch.bfloat16)
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for _ in range(500):
        optimizer.zero_grad()
        model(x).float().pow(2).mean().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(start, optimizer.param_groups[0]["params"], strict=True))
    assert fingerprint(model).digest == before.digest


def test_meta():
    check_meta(Attention, config())
    check_meta(lambda: Attention(kdim=5, vdim=6), config(target_modules=["attn", "out_proj"]))


def test_the_starts_are_drawn_for_each_projection():
    torch.manual_seed(0)
    model = Attention(kdim=200, vdim=300)
    inject(model, config(target_modules=["attn"], init="kaiming"))
    a = model.attn.lora_A.split([WIDTH, 200, 300], dim=1)
    assert [round(float(part.detach().abs().max()) * part.shape[1] ** 0.5, 1) for part in a[1:]] == [1.0, 1.0]


@pytest.mark.parametrize(("slices", "targets"), [({}, ["attn"]), ({"attn": ["q", "v"]}, ["attn"])])
def test_peft_opens_ours(slices, targets, tmp_path):
    check_peft_opens_ours(Attention, run_with(), config(target_modules=targets, slices=slices), tmp_path)


def test_we_open_pefts_where_peft_is_right(tmp_path):
    """PEFT counts out_proj's update twice (its PR 3774), so that its A and B of out_proj are zero here."""

    def quiet(model):
        q, k, v = inputs(torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "out_proj.lora" in name:
                    parameter.zero_()
        return model(q, k, v)

    check_we_open_pefts(Attention, quiet, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"]), tmp_path)


def test_out_proj_of_pefts_directory_counts_once(tmp_path):
    theirs = peft.get_peft_model(Attention(), peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
    theirs.save_pretrained(tmp_path)
    model = Attention()
    load_adapter(model, tmp_path)
    base = theirs.base_model.model.attn.base_layer.out_proj
    delta = 2.5 * base.lora_B["default"].weight @ base.lora_A["default"].weight
    assert torch.allclose(model.attn.out_proj.delta_weight(), delta, atol=1e-6)


@pytest.mark.parametrize("ranks", [{}, {"out_proj": 4}, {"attn": 4}])
@pytest.mark.parametrize("slices", [{}, {"attn": ["q", "v"]}])
@pytest.mark.parametrize("rslora", [False, True])
def test_different_ranks_and_alphas_come_back(ranks, slices, rslora, tmp_path):
    model = Attention()
    chosen = {"target_modules": ["attn", "out_proj"], "slices": slices, "use_rslora": rslora}
    inject(model, config(rank_pattern=ranks, alpha_pattern={"out_proj": 5.0}, **chosen))
    stir(model)
    again = Attention()
    load_adapter(again, save_adapter(model, tmp_path))
    for name in ("attn", "attn.out_proj"):
        ours, theirs = model.get_submodule(name), again.get_submodule(name)
        assert ours.lora_settings == theirs.lora_settings
        assert torch.allclose(ours.lora_A, theirs.lora_A)
        assert torch.allclose(ours.lora_B, theirs.lora_B)
    assert relative(run_with()(again), run_with()(model)) < 1e-6


def test_disabled_is_the_plain_model_where_only_out_proj_is_adapted():
    model = Attention()
    plain = copy.deepcopy(model)
    inject(model, config(target_modules=["out_proj"]))
    stir(model)
    with disabled(model):
        assert torch.equal(run_with()(model), run_with()(plain))


def test_an_attention_with_a_forward_of_its_own_reads_the_adapted_weights():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return F.linear(F.linear(x, self.in_proj_weight)[..., :WIDTH], self.out_proj.weight) + self.out_proj(x)

    model, x = nn.Sequential(Own(WIDTH, HEADS)), torch.randn(3, WIDTH)
    before = model(x)
    inject(model, config(target_modules=["0", "out_proj"]))
    assert torch.equal(model(x), before)
    stir(model)
    adapted = model(x)
    assert relative(adapted, before) > 1e-2
    merge(model)
    assert relative(model(x), adapted) < 1e-5


def test_an_out_proj_that_attention_would_not_read_as_adapted_is_refused_by_name():
    model = Attention()
    model.attn.out_proj = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(TargetError, match=r"attn\.out_proj.*reads its weight"):
        inject(model, config(target_modules=["out_proj"]))


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_of_out_proj_is_what_attention_reads(training):
    model = nn.ModuleDict({"attention": Attention(batch_first=True), "body": nn.Linear(WIDTH, WIDTH)}).train(training)
    q = inputs(torch.float32)[0]
    plain = model["attention"](q, q, q)
    inject(model, config(target_modules=["body"], modules_to_save=["attention.attn.out_proj"]))
    assert torch.equal(model["attention"](q, q, q), plain)
    with torch.no_grad():
        model["attention"].attn.out_proj.lora_copy.bias.add_(torch.arange(float(WIDTH)))
        out = model["attention"](q, q, q)
        assert relative(out, plain) > 1e-2
        with disabled(model):
            assert torch.equal(model["attention"](q, q, q), plain)
    merge(model)
    assert torch.equal(model["attention"](q, q, q), out)


def test_unknown_parts_are_refused():
    with pytest.raises(TargetError, match="'attn' has the parts q, k, v, got 'w'"):
        inject(Attention(), config(target_modules=["attn"], slices={"attn": ["w"]}))
