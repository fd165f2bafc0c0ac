"""Which module is the output head, that `all-linear` leaves out."""

import pytest
import torch
from torch import nn

from lora_lightning.lora.targets.output_heads import output_head
from tests.factories import FAMILIES, Own, bert, hf


def block() -> nn.Module:
    return nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})


def plain(**last: nn.Module) -> nn.Module:
    """Repeated blocks, and what comes after them."""
    return nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), **last})


def own(*without: str) -> nn.Module:
    model = Own()
    for name in without:
        delattr(model, name)
    return model


def of_transformers(model: str, **sizes: int) -> nn.Module:
    sizes = sizes or {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with torch.device("meta"):
        return hf(model, **sizes)


DISTILLED = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (FAMILIES["sequential"].make, ("4",)),
        (FAMILIES["encoder"].make, ()),
        (FAMILIES["bert"].make, ("classifier",)),
        (FAMILIES["llama"].make, ("lm_head",)),
        (FAMILIES["gpt"].make, ("lm_head",)),
        (lambda: of_transformers("DistilBertForSequenceClassification", **DISTILLED), ("classifier",)),
        (lambda: of_transformers("LlamaForSequenceClassification"), ("score",)),
        (lambda: of_transformers("BertForQuestionAnswering"), ("qa_outputs",)),
        (lambda: of_transformers("ViTForImageClassification"), ("classifier",)),
        # by its whole name
        (own, ("lm_head",)),
        (lambda: own("lm_head"), ("overhead",)),
        (lambda: own("lm_head", "overhead"), ("head",)),
        # the last linear layer of a plain model, or several of them, and not the last one of a repeated block
        *[(lambda name=name: plain(**{name: nn.Linear(4, 2)}), (name,)) for name in ("fc", "head", "readout")],
        (lambda: plain(classifier=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))), ("classifier",)),
        (plain, ()),
        # a backbone without a head
        (lambda: bert().bert, ()),
        (lambda: FAMILIES["llama"].build().model, ()),
        (lambda: nn.Linear(3, 3), ()),
        (lambda: nn.Sequential(nn.Linear(3, 3)), ()),
        (lambda: nn.LayerNorm(3), ()),
    ],
)
def test_the_head_is_what_makes_the_output(make, head):
    assert output_head(make()) == head
