"""Packed training is unpacked training: the same loss and the same gradients, and every token is there."""

import random
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning import LoRAConfig, LoRAError, inject
from lora_lightning.data.loading.packing import cut, pack, pack_rows
from lora_lightning.data.text import pad_batch
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.tasks.language_model import CausalLM
from tests.factories import move
from tests.tiny_lm import VOCABULARY, make_model

LENGTH = 16
COLLATE = partial(pad_batch, pad_token_id=2)


def documents(count, *, longest=40, seed=0):
    rng = random.Random(seed)
    ids = [[rng.randrange(3, len(VOCABULARY)) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    return {"input_ids": ids, "labels": [[-100 if rng.random() < 0.2 else i for i in row] for row in ids]}


def as_rows(columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_document_is_in_one_row_no_row_is_too_long_and_no_two_fit_into_one(lengths):
    rows = pack(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert rows == pack(lengths, 20)
    used = sorted(sum(lengths[i] for i in row) for row in rows)
    assert max(used, default=0) <= 20
    assert len(used) < 2 or sum(used[:2]) > 20
    for length in (0, 21):
        with pytest.raises(LoRAError, match=f"a document of {length} tokens does not go into rows of 20"):
            pack([3, length], 20)


def test_long_documents_are_cut_and_the_first_of_each_piece_is_not_trained_on():
    rows = {"input_ids": [[3, 4, 5, 6, 7], [8]], "labels": [[3, 4, 5, 6, 7], [8]], "document": [1, 2]}
    assert cut(rows, max_length=2) == {
        "input_ids": [[3, 4], [5, 6], [7], [8]],
        "labels": [[-100, 4], [-100, 6], [-100], [-100]],
        "document": [1, 1, 1, 2],
    }


def adapted(kind, **config):
    """A model in float64 whose adapters are not zero, so that A and B both have gradients."""
    model = make_model(kind, dtype=torch.float64, **config)
    inject(model, LoRAConfig(r=3, alpha=6))
    return move(model)


def loss_and_gradients(model, batches):
    """Of the mean over all tokens, from batches that are each a mean over their own."""
    model.zero_grad()
    outs = [CausalLM().step(model, batch) for batch in batches]
    tokens = sum(out.weight for out in outs)
    loss = sum(out.loss * out.weight for out in outs) / tokens
    loss.backward()
    return loss.detach(), tokens, [tensor.grad.clone() for tensor in adapter_tensors(model).values()]


# (eager attention takes its softmax in float32 whatever the model's dtype is)
@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        *((kind, {"attn_implementation": "sdpa"}, 1e-12) for kind in ("llama", "gpt2", "qwen2", "gemma")),
        *((kind, {"attn_implementation": "eager"}, 1e-5) for kind in ("llama", "gpt2", "gemma")),
        *((kind, {"sliding_window": 5}, 1e-12) for kind in ("mistral", "gemma3_text")),
    ],
)
def test_packed_training_equals_unpacked(kind, options, tolerance):
    model, columns = adapted(kind, **options), documents(12)
    packed, plain = as_rows(pack_rows(columns, max_length=LENGTH)), as_rows(cut(columns, max_length=LENGTH))
    assert len(packed) < len(plain)
    one = loss_and_gradients(model, [COLLATE(packed[:4]), COLLATE(packed[4:])])
    two = loss_and_gradients(model, [COLLATE(plain[i : i + 5]) for i in range(0, len(plain), 5)])
    assert one[1] == two[1]
    assert float((one[0] - two[0]).abs()) <= tolerance * float(two[0])
    for a, b in zip(one[2], two[2], strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())
