from __future__ import annotations

import pytest
from torch import nn

from lora_lightning.lora.heads import output_head
from tests.factories import FAMILIES, Own, bert


def linears(*, last: str, blocks: int = 2) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})] * 1)
    model.layers.extend([nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}) for _ in range(blocks - 1)])
    if last:
        setattr(model, last, nn.Linear(4, 2))
    return model


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("sequential", ("4",)),
        ("own", ("lm_head",)),
        ("encoder", ()),
        ("bert", ("classifier",)),
        ("llama", ("lm_head",)),
        ("gpt", ("lm_head",)),
    ],
)
def test_the_head_is_what_makes_the_output(name, head):
    assert output_head(FAMILIES[name].build()) == head


def test_a_backbone_without_a_head_has_none():
    assert output_head(bert().bert) == ()
    assert output_head(FAMILIES["llama"].build().model) == ()
    assert output_head(nn.Linear(3, 3)) == ()
    assert output_head(nn.Sequential(nn.Linear(3, 3))) == ()
    assert output_head(nn.LayerNorm(3)) == ()


@pytest.mark.parametrize("name", ["fc", "head", "classifier", "readout"])
def test_the_last_linear_layer_of_a_plain_model_is_its_head(name):
    assert output_head(linears(last=name)) == (name,)


def test_the_last_layer_of_a_repeated_block_is_no_head():
    assert output_head(linears(last="")) == ()


def test_a_head_of_several_layers_is_one():
    model = linears(last="")
    model.classifier = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert output_head(model) == ("classifier",)


def test_a_head_is_told_by_its_whole_name():
    model = Own()
    del model.lm_head, model.overhead
    assert output_head(model) == ("head",)
    model.overhead = nn.Linear(3, 3)
    assert output_head(model) == ("overhead",)


@pytest.mark.parametrize(
    ("cls", "config", "head"),
    [
        ("RobertaForSequenceClassification", "RobertaConfig", ("classifier",)),
        ("DistilBertForSequenceClassification", "DistilBertConfig", ("classifier",)),
        ("LlamaForSequenceClassification", "LlamaConfig", ("score",)),
        ("BertForTokenClassification", "BertConfig", ("classifier",)),
        ("BertForQuestionAnswering", "BertConfig", ("qa_outputs",)),
        ("ViTForImageClassification", "ViTConfig", ("classifier",)),
    ],
)
def test_heads_of_transformers_models(cls, config, head):
    import torch
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if config == "DistilBertConfig":
        sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    assert output_head(model) == head
