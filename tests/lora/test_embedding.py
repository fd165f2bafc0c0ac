"""`nn.Embedding`: padding row, max_norm, subclasses that scale, ties."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning import disabled, inject, load_adapter, merge
from lora_lightning.lora.errors import AdapterError, TargetError
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


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is scaled."""

    def forward(self, input):
        return super().forward(input) * 3.5


def net(cls=nn.Embedding, **kwargs):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(cls(11, 6, **kwargs), nn.Tanh(), nn.Linear(6, 3))

    return make


IDS = torch.tensor([[1, 2, 2, 0], [5, 0, 7, 1]])


def run(model):
    return model(IDS)


@dtypes
@pytest.mark.parametrize("cls", [nn.Embedding, Scaled])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_laws(cls, padding_idx, dtype, tmp_path):
    make = net(cls, padding_idx=padding_idx)
    report = check_laws(make, run, config(target_modules=["0"]), dtype, tmp_path)
    assert [row.kind for row in report.modules] == ["Embedding"]
    assert report.modules[0].parameters == 2 * 11 + 6 * 2


@dtypes
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_laws_with_max_norm(norm_type, dtype, tmp_path):
    def make():
        model = net(max_norm=1.0, norm_type=norm_type)()
        model(torch.arange(11))  # torch rewrites W0 here
        with torch.no_grad():
            model[0].weight.mul_(0.99)  # from now on it need not, in any dtype
        return model

    check_laws(make, run, config(target_modules=["0"]), dtype, tmp_path)


@dtypes
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0])
def test_a_fresh_adapter_cuts_norms_as_torch_does(norm_type, dtype):
    plain = nn.Sequential(nn.Embedding(11, 6, max_norm=0.5, norm_type=norm_type)).to(dtype)
    model = copy.deepcopy(plain)
    inject(model, config(target_modules=["0"]))
    assert torch.equal(model(IDS), plain(IDS))


def test_max_norm_does_not_rewrite_w0_once_adapted():
    model = net(max_norm=0.5)()
    inject(model, config(target_modules=["0"]))
    stir(model)
    before = fingerprint(model).digest
    out = model[0](IDS)
    with disabled(model):
        model(IDS)
    assert fingerprint(model).digest == before
    assert (out.norm(dim=-1) <= 0.5 + 1e-5).all()


def test_the_padding_row_keeps_its_value_and_has_no_gradient():
    model = net(padding_idx=0)()
    inject(model, config(target_modules=["0"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (run(model) - 1).pow(2).mean().backward()
        assert not model[0].lora_A.grad[:, 0].any()
        optimizer.step()
    assert torch.equal(model[0](torch.tensor([0]))[0], model[0].weight[0])
    merge(model)
    assert not model[0].weight[0].any()


def test_a_row_that_was_never_seen_keeps_its_value():
    model = net()()
    inject(model, config(target_modules=["0"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        run(model).pow(2).mean().backward()
        optimizer.step()
    assert torch.equal(model[0](torch.tensor([9]))[0], model[0].weight[9])


@pytest.mark.parametrize("by_count", [False, True])
def test_gradients_are_the_formulas(by_count):
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=0, scale_grad_by_freq=by_count)).double()
    inject(model, config(target_modules=["0"]))
    stir(model)
    layer = model[0]
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    weights = torch.randn(*IDS.shape, 6, dtype=torch.float64)
    (model(IDS) * weights).sum().backward()
    want_a, want_b = torch.zeros_like(A), torch.zeros_like(B)
    counts = torch.bincount(IDS.flatten(), minlength=11)
    for token, g in zip(IDS.flatten().tolist(), weights.reshape(-1, 6), strict=True):
        want_b += 1.5 * torch.outer(g, A[:, token])
        if token != 0:
            want_a[:, token] += 1.5 * (B.T @ g) / (counts[token] if by_count else 1)
    assert torch.allclose(layer.lora_A.grad, want_a, atol=1e-12)
    assert torch.allclose(layer.lora_B.grad, want_b, atol=1e-12)
    one_hot = F.one_hot(IDS, 11).double()
    assert torch.allclose(model(IDS), one_hot @ (layer.weight + 1.5 * (B @ A).T), atol=1e-12)


def test_dropout_keeps_or_drops_whole_updates():
    model = nn.Sequential(nn.Embedding(11, 6))
    inject(model, config(target_modules=["0"], dropout=0.5))
    stir(model)
    ids = torch.arange(11)
    with disabled(model):
        base = model(ids)
    full = model.eval()(ids) - base
    dropped = model.train()(ids) - base
    kept = dropped.abs().sum(dim=-1) > 0
    assert 0 < kept.sum() < 11
    assert torch.allclose(dropped[kept], 2 * full[kept], atol=1e-5)


def test_meta():
    check_meta(net(), config(target_modules=["0"]))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


@dtypes
def test_laws_of_a_tied_embedding(dtype, tmp_path):
    check_laws(Tied, run, config(target_modules=["embed"]), dtype, tmp_path)


def test_merging_a_tied_embedding_leaves_the_head_as_it_was():
    model = Tied()
    inject(model, config(target_modules=["embed"]))
    stir(model)
    head = model.head.weight.detach().clone()
    report = merge(model)
    assert report.untied == ["embed"]
    assert torch.equal(model.head.weight, head)
    assert not torch.equal(model.embed.weight, head)


def test_peft_opens_ours_and_we_open_pefts(tmp_path):
    make = net(padding_idx=0)
    check_peft_opens_ours(make, run, config(target_modules=["0", "2"]), tmp_path)
    check_we_open_pefts(make, run, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"]), tmp_path)


def gemma():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=32, **shape, **heads, attn_implementation="eager"))


def run_gemma(model):
    return model(IDS).logits


@dtypes
def test_laws_of_gemmas_scaled_embedding(dtype, tmp_path):
    check_laws(gemma, run_gemma, config(target_modules=["embed_tokens"]), dtype, tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tie")
def test_peft_opens_ours_of_gemma_and_we_open_pefts_with_its_whole_matrix(tmp_path):
    check_peft_opens_ours(gemma, run_gemma, config(target_modules=["embed_tokens"]), tmp_path)
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["embed_tokens"])
    check_we_open_pefts(gemma, run_gemma, theirs, tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "theirs" / "adapter_model.safetensors", "pt") as file:
        assert any(key.endswith("embed_tokens.base_layer.weight") for key in file.keys())  # noqa: SIM118
    other = gemma()
    nn.init.normal_(other.model.embed_tokens.weight)
    with pytest.raises(AdapterError, match=r"weight of 'model.embed_tokens' that is not this model's"):
        load_adapter(other, tmp_path / "theirs")


def test_an_embedding_that_reads_its_weight_itself_is_refused():
    class Own(nn.Embedding):
        def forward(self, input):
            return self.weight[input]

    with pytest.raises(TargetError, match="cannot adapt '0': Own has a forward of its own"):
        inject(net(Own)(), config(target_modules=["0"]))


def test_all_linear_leaves_embeddings_out():
    model = net()()
    assert [row.module for row in inject(model, config(target_modules="2|0")).modules] == ["0", "2"]
    twin = copy.deepcopy(net()())
    twin.append(nn.Linear(3, 3))
    assert "0" not in [row.module for row in inject(twin, config()).modules]


def test_a_linear_subclass_that_scales_merges_to_what_it_computed():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(4, 4)).double()
    inject(model, config(target_modules=["0"]))
    stir(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    adapted = model(x)
    merge(model)
    assert relative(model(x), adapted) < 1e-12
