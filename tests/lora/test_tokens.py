"""Rows of an embedding that train in full (`trainable_token_indices`)."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_lightning import inject, merge
from lora_lightning.lora.errors import ConfigError, TargetError
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import TokenRows
from tests.lora.laws import check_laws, check_peft_opens_ours, check_we_open_pefts, config, dtypes, stir
from tests.lora.test_embedding import IDS, Scaled, Tied, gemma, net, run, run_gemma


@dtypes
@pytest.mark.parametrize("cls", [nn.Embedding, Scaled])
@pytest.mark.parametrize("modules", [[], ["2"]])
def test_laws(cls, modules, dtype, tmp_path):
    chosen = config(target_modules=modules, trainable_token_indices=[7, 1, 10])
    report = check_laws(net(cls), run, chosen, dtype, tmp_path)
    assert report.tokens == {"0": 3 * 6}


@dtypes
def test_laws_of_a_tied_head(dtype, tmp_path):
    check_laws(Tied, run, config(target_modules=[], trainable_token_indices={"embed": [1, 5]}), dtype, tmp_path)


@dtypes
def test_laws_of_gemma_with_its_scale_and_its_tied_head(dtype, tmp_path):
    chosen = config(target_modules=["q_proj"], trainable_token_indices=[1, 5])
    check_laws(gemma, run_gemma, chosen, dtype, tmp_path)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    return T5ForConditionalGeneration(T5Config(**sizes))


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40}
    return BartForConditionalGeneration(BartConfig(**layers, **sizes, max_position_embeddings=32, scale_embedding=True))


@dtypes
@pytest.mark.parametrize("make", [t5, bart])
def test_laws_where_encoder_decoder_and_head_share_the_weight(make, dtype, tmp_path):
    def run(model):
        return model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits

    check_laws(make, run, config(target_modules=[], trainable_token_indices=[1, 5]), dtype, tmp_path)


def test_only_the_chosen_rows_differ_and_gradients_are_the_formulas():
    model = net()().double()
    plain = copy.deepcopy(model)
    inject(model, config(target_modules=[], trainable_token_indices=[7, 1, 10]))
    stir(model)
    ids = torch.arange(11)
    changed = (model[0](ids) != plain[0](ids)).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 7, 10]
    weights = torch.randn(*IDS.shape, 6, dtype=torch.float64)
    (model[0](IDS) * weights).sum().backward()
    want = torch.stack([weights[token == IDS].sum(0) for token in (1, 7, 10)])
    assert torch.allclose(model[0].lora_tokens.grad, want, atol=1e-12)


def test_merge_writes_the_rows_and_keeps_the_tie():
    model = Tied()
    inject(model, config(target_modules=[], trainable_token_indices=[1, 5]))
    stir(model)
    rows = model.embed.lora_tokens.detach().clone()
    merge(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight[[1, 5]], rows)
    assert type(model.head) is nn.Linear


def test_meta():
    with torch.device("meta"):
        model = net()()
    inject(model, config(target_modules=[], trainable_token_indices=[1, 5]))
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    assert torch.equal(model[0].lora_tokens, model[0].weight[[1, 5]])


@pytest.mark.filterwarnings("ignore:.*tied", "ignore:.*tie_word")
def test_peft_opens_ours_and_we_open_pefts(tmp_path):
    chosen = config(target_modules=["q_proj"], trainable_token_indices=[7, 1])
    check_peft_opens_ours(gemma, run_gemma, chosen, tmp_path)
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], trainable_token_indices=[7, 1])
    model = check_we_open_pefts(gemma, run_gemma, theirs, tmp_path)
    assert [name for name, _ in grafted_modules(model, TokenRows)] == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([11], "'0' has rows 0 to 10, got 11"),
        ({"embed": [1]}, "no module matches 'embed'"),
        ({"2": [1]}, "'2' is a Linear, not an nn.Embedding"),
    ],
)
def test_refusals(wanted, message):
    with pytest.raises(TargetError, match=message):
        inject(net()(), config(target_modules=[], trainable_token_indices=wanted))


def test_more_refusals():
    with pytest.raises(ConfigError, match="from 0 on, got"):
        config(trainable_token_indices=[-1])
    with pytest.raises(ConfigError, match="a token twice"):
        config(trainable_token_indices=[1, 1])
    with pytest.raises(TargetError, match="selected twice"):
        inject(net()(), config(target_modules=["0"], trainable_token_indices=[1]))
    two = nn.ModuleDict({"a": nn.Embedding(3, 2), "b": nn.Embedding(3, 2)})
    with pytest.raises(TargetError, match="which embedding is the input's cannot be told"):
        inject(two, config(target_modules=[], trainable_token_indices=[1]))
