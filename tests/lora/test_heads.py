from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, disabled, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.targets.output_heads import output_head
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


class Chain(nn.Module):
    """Calls its head, or goes through what the head holds."""

    def __init__(self, walks):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.walks = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), walks

    def forward(self, x):
        x = self.body(x)
        if not self.walks:
            return self.head(x)
        for layer in self.head:
            x = layer(x)
        return x + 0 * self.head[-1].weight.sum() + len(self.head)


@pytest.mark.parametrize("walks", [False, True])
def test_a_sequence_trained_in_full_is_a_list_of_the_same_length(walks, tmp_path):
    plain, x = Chain(walks), torch.randn(2, 4)
    model = copy.deepcopy(plain)
    inject(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    assert torch.equal(model(x), plain(x))
    model(x).sum().backward()
    with torch.no_grad():
        for parameter in model.head.lora_copy.parameters():
            assert parameter.grad.any()
            parameter.add_(0.1)
    trained = model(x)
    with disabled(model):
        assert torch.equal(model(x), plain(x))
    again = copy.deepcopy(plain)
    load_adapter(again, save_adapter(model, tmp_path))
    assert torch.equal(again(x), trained)
    merge(model)
    assert torch.allclose(model(x), trained)
    assert type(model.head) is nn.Sequential
