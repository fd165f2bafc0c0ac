"""The paper's numbers of trained parameters (arXiv 2106.09685), from configs alone, on the meta device."""

from functools import partial

import pytest
import torch

from lora_lightning import LoRAConfig, inject
from tests.factories import hf


def gpt(width, layers, heads):
    return partial(hf, "GPT2Model", n_embd=width, n_layer=layers, n_head=heads)


roberta_base = partial(hf, "RobertaModel")
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
roberta_large = partial(hf, "RobertaModel", **LARGE)
XXL = {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144}
deberta_xxl = partial(hf, "DebertaV2Model", **XXL)
QUERY_VALUE = {"target_modules": ["query", "value"]}
OF_C_ATTN = {"target_modules": ["c_attn"], "slices": {"c_attn": ["q", "v"]}}


@pytest.mark.parametrize(
    ("make", "r", "chosen", "count"),
    [
        (roberta_base, 8, QUERY_VALUE, 294_912),
        (roberta_large, 8, QUERY_VALUE, 786_432),
        (deberta_xxl, 16, {"target_modules": ["query_proj", "value_proj"]}, 4_718_592),
        (gpt(1024, 24, 16), 4, OF_C_ATTN, 393_216),
        (gpt(1280, 36, 20), 4, OF_C_ATTN, 737_280),
        (gpt(12288, 96, 96), 4, OF_C_ATTN, 18_874_368),
    ],
    ids=["RoBERTa base", "RoBERTa large", "DeBERTa XXL", "GPT-2 M", "GPT-2 L", "GPT-3"],
)
def test_the_papers_counts(make, r, chosen, count):
    with torch.device("meta"):
        model = make()
    assert inject(model, LoRAConfig(r=r, **chosen)).trainable == count
