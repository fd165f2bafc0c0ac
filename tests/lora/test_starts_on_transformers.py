"""The data-driven starts on a transformers model, which returns its own loss, from a DataLoader of padded batches."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning import LoRAConfig, inject, merge
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.inject import adapted_layers
from tests.lora.options_support import shake


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, attention_dropout=0.1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loader():
    ids = torch.randint(1, 32, (8, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.randint(3, 7, (8, 1), generator=torch.Generator().manual_seed(1))).long()
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": i.masked_fill(m == 0, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]
    return DataLoader(rows, batch_size=4)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_starts_from_a_data_loader(init):
    model, batch = llama().train(), next(iter(loader()))
    before = fingerprint(model)
    inject(model, LoRAConfig(r=2, init=init), data=loader())
    assert model.training
    assert fingerprint(model) == before
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, llama().eval()(**batch).logits)
    shake(model)
    expected = model(**batch).logits
    merge(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_first_step_from_lora_ga_is_the_gradients_best_approximation():
    """Theorem 3.1 of the paper: a small step of A and B moves W by -G on its 2 r first singular directions."""
    plain, model, batches = llama().eval(), llama().eval(), list(loader())
    sum(plain(**batch).loss for batch in batches).backward()
    inject(model, LoRAConfig(r=2, init="lora_ga", target_modules="attention"), data=batches)
    sum(model(**batch).loss for batch in batches).backward()
    for name, layer in adapted_layers(model):
        step = layer.lora_B.grad @ layer.lora_A + layer.lora_B @ layer.lora_A.grad
        U, S, Vh = torch.linalg.svd(plain.get_submodule(name).weight.grad)
        best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
        assert torch.nn.functional.cosine_similarity(step.flatten(), best.flatten(), dim=0) > 1 - 1e-4
