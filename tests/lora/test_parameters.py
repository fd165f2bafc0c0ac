"""Bare parameters: matrices, and stacks of them such as a mixture's experts (`target_parameters`)."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_lightning import disabled, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.layers import LoRAParameter
from tests.lora.laws import check_laws, check_meta, check_peft_opens_ours, check_we_open_pefts, config, dtypes, stir


class Experts(nn.Module):
    """Three experts in stacks; `is_transposed` says which way the matrices lie, as in transformers."""

    def __init__(self, transposed=False):
        super().__init__()
        self.is_transposed = transposed
        up, down = (3, 12, 6), (3, 6, 12)
        self.up = nn.Parameter(torch.randn(*(down if transposed else up)))
        self.bias = nn.Parameter(torch.randn(3, 12))
        self.down = nn.Parameter(torch.randn(*(up if transposed else down)))
        self.reads = 0

    def forward(self, x):
        out = 0
        for expert in range(3):  # the parameter is read once for each expert, as in transformers' eager experts
            up, down = self.up[expert], self.down[expert]
            hidden = torch.tanh(x @ (up if self.is_transposed else up.T) + self.bias[expert])
            out = out + hidden @ (down if self.is_transposed else down.T)
        return out


class Mixture(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(6, 6)
        self.experts = Experts(transposed)
        self.mix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return self.experts(self.proj(x)) @ self.mix.T


def run(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return model(x.to(next(model.parameters()).dtype))


def only(*names, **kwargs):
    return config(target_modules=[], target_parameters=list(names), **kwargs)


@dtypes
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("names", [("experts.up",), ("up", "down"), ("mix",), ("mix", "experts.down", "up")])
def test_laws(names, transposed, dtype, tmp_path):
    report = check_laws(lambda: Mixture(transposed), run, only(*names), dtype, tmp_path)
    assert {row.kind for row in report.modules} == {"Parameter"}


@dtypes
def test_laws_beside_modules(dtype, tmp_path):
    chosen = config(target_modules=["proj"], target_parameters=["up", "down"], rank_pattern={"down": 1})
    report = check_laws(Mixture, run, chosen, dtype, tmp_path)
    assert [(row.module, row.r) for row in report.modules] == [("proj", 2), ("experts.up", 2), ("experts.down", 1)]


@pytest.mark.parametrize("transposed", [False, True])
def test_delta_and_gradients_are_the_formulas(transposed):
    model = Mixture(transposed).double()
    inject(model, only("up", "mix"))
    stir(model)
    adapter = model.experts.get_submodule("lora_of_up")
    A, B = (t.detach().clone().requires_grad_() for t in (adapter.lora_A, adapter.lora_B))
    assert A.shape == (2 * 3, 6)
    assert B.shape == (12, 2 * 3)
    parts = [1.5 * sum(torch.outer(B[:, rank * 3 + e], A[e * 2 + rank]) for rank in range(2)) for e in range(3)]
    delta = torch.stack([part.T if transposed else part for part in parts])
    assert torch.allclose(adapter.delta_weight(), delta, atol=1e-14)
    assert torch.allclose(model.experts.up, model.experts._parameters["up"] + delta, atol=1e-14)
    g = torch.randn_like(delta)
    (model.experts.up * g).sum().backward()
    (delta * g).sum().backward()
    assert torch.allclose(adapter.lora_A.grad, A.grad, atol=1e-12)
    assert torch.allclose(adapter.lora_B.grad, B.grad, atol=1e-12)


def test_the_parameter_stays_under_its_name_and_is_computed_once_in_a_forward(monkeypatch):
    model = Mixture()
    before, W0 = fingerprint(model).digest, model.experts.up
    inject(model, only("up"))
    assert model.state_dict(keep_vars=True)["experts.up"] is W0
    assert dict(model.named_parameters())["experts.up"] is W0
    calls = []
    updated = LoRAParameter.updated_weights
    monkeypatch.setattr(LoRAParameter, "updated_weights", lambda self: calls.append(1) or updated(self))
    run(model)
    assert len(calls) == 1
    assert fingerprint(model).digest == before


def test_reports_call_a_parameter_by_its_name():
    model = Mixture()
    report = inject(model, config(target_modules=["proj"], target_parameters=["up", "mix"]))
    stir(model)
    names = {"proj", "experts.up", "mix"}
    assert {row.module for row in report.modules} == merge(model).kept.keys() == names


def test_disabled_reads_w0():
    model = Mixture()
    W0 = model.experts.up
    inject(model, only("up"))
    stir(model)
    assert not torch.equal(model.experts.up, W0)
    with disabled(model):
        assert model.experts.up is W0


def test_a_state_dict_goes_in_and_out():
    model = Mixture()
    inject(model, only("up", "down"))
    stir(model)
    again = Mixture()
    inject(again, only("up", "down"))
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again), run(model))
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run(again), run(model))
    assert again.to(torch.float64).experts.up.dtype == torch.float64


def test_meta():
    check_meta(Mixture, only("up", "mix"))


@pytest.mark.parametrize("transposed", [False, True])
def test_peft_opens_ours_and_we_open_pefts(transposed, tmp_path):
    def make():
        return Mixture(transposed)

    # PEFT cannot adapt a parameter of the model itself beside others, such as `mix` here.
    check_peft_opens_ours(make, run, only("up", "down"), tmp_path)
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=["experts.up", "experts.down"])
    check_we_open_pefts(make, run, theirs, tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("experts.upp",), "target_parameters: no parameter matches 'experts.upp'; did you mean"),
        (("proj.bias",), "cannot adapt 'proj.bias': it is torch.float32 of shape"),
    ],
)
def test_refusals(names, message):
    with pytest.raises(TargetError, match=message):
        inject(Mixture(), only(*names))


def test_dropout_that_cannot_be_honoured_is_refused():
    with pytest.raises(TargetError, match="dropout cannot be honoured"):
        inject(Mixture(), only("up", dropout=0.1))


def test_a_weight_named_twice_is_refused():
    with pytest.raises(TargetError, match="share one weight"):
        inject(Mixture(), config(target_modules=["proj"], target_parameters=["proj.weight"]))


def test_a_rank_beyond_one_expert_is_refused():
    with pytest.raises(TargetError, match=r"'experts.up' allows \(6"):
        inject(Mixture(), only("up", r=7))


# Families that keep their experts as 3-D parameters, with each of transformers' products over them.


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**shape, **heads))


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads, num_experts_per_tok=2, vocab_size=32))


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**shape, **heads))


def run_lm(model):
    return model(torch.arange(12).view(2, 6)).logits


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("product", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", [mixtral, qwen3_moe, gpt_oss], ids=lambda f: f.__name__)
def test_laws_of_experts(family, product, tmp_path):
    def make():
        torch.manual_seed(0)
        model = family()
        model.set_experts_implementation(product)
        for name, parameter in model.named_parameters():
            if "experts" in name:
                nn.init.normal_(parameter, std=0.2)
        return model

    chosen = config(target_modules=["q_proj"], target_parameters=EXPERTS)
    report = check_laws(make, run_lm, chosen, torch.float32, tmp_path)
    assert [row.module.rpartition(".")[2] for row in report.modules] == ["q_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize("family", [mixtral, gpt_oss], ids=lambda f: f.__name__)
def test_peft_opens_our_experts(family, tmp_path):
    def make():
        torch.manual_seed(0)
        model = family()
        for name, parameter in model.named_parameters():
            if "experts" in name:
                nn.init.normal_(parameter, std=0.2)
        return model

    check_peft_opens_ours(make, run_lm, only(*EXPERTS), tmp_path)


def test_an_adapter_of_experts_is_loaded_into_a_copy(tmp_path):
    model = Mixture()
    plain = copy.deepcopy(model)
    inject(model, only("down", "up"))
    stir(model)
    load_adapter(plain, save_adapter(model, tmp_path))
    assert torch.equal(run(plain), run(model))
