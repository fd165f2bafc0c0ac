"""Positions of rows: documents of one row must not see each other, and no row is longer than the model has learnt."""

import pytest
import torch
import transformers
from torch import nn

from lora_lightning import LoRAError
from lora_lightning.tasks.language_model import CausalLM
from lora_lightning.tasks.positions import as_packed, learned_positions, refuse_mixing, refuse_too_long
from tests.tiny_lm import VOCABULARY, make_model

IDS = torch.arange(3, len(VOCABULARY))[None]
POSITIONS = torch.tensor([[*range(8), *range(5), *range(IDS.shape[1] - 13)]])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"attn_implementation": "eager"}) for kind in ("llama", "qwen2", "mistral", "gpt_neox")),
        *((kind, {"attn_implementation": "sdpa"}) for kind in ("llama", "gpt2", "gemma", "phi", "falcon")),
        *((kind, {"sliding_window": 4}) for kind in ("gemma2", "gemma3_text")),
    ],
)
def test_a_model_that_keeps_documents_apart_is_taken(kind, options):
    model = make_model(kind, **options)
    refuse_mixing(model, IDS)
    refuse_mixing(model.double(), IDS)


@pytest.mark.parametrize("kind", ["opt", "bloom", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_them_is_refused(kind, dtype):
    model = make_model(kind, dtype=dtype)
    batch = {"input_ids": IDS, "position_ids": POSITIONS, "labels": IDS}
    with pytest.raises(LoRAError, match=f"{type(model).__name__} cannot be given packed rows.*set data.init_args.pack"):
        CausalLM().step(model, batch)


class Mean(nn.Module):
    """Places of its own, and the mean of what came before, within documents or not."""

    def __init__(self, within):
        super().__init__()
        self.within = within
        self.embed, self.head = nn.Embedding(len(VOCABULARY), 8), nn.Linear(8, len(VOCABULARY))
        self.places = nn.Embedding(64, 8)

    def forward(self, input_ids, position_ids=None):
        t = input_ids.shape[1]
        visible = torch.ones(t, t).tril().expand(len(input_ids), t, t)
        if position_ids is not None and self.within:
            document = (position_ids == 0).cumsum(-1)
            visible = visible * (document[:, None] == document[:, :, None])
        mixed = visible / visible.sum(-1, keepdim=True) @ self.embed(input_ids)
        return self.head(mixed + self.places(torch.arange(t)))


def test_positions_that_are_not_looked_at_or_not_taken_are_found_out():
    for within, said in ((False, "change with the one before it"), (True, "are not those it has alone")):
        with pytest.raises(LoRAError, match=said):
            refuse_mixing(Mean(within), IDS)
    without = nn.Sequential(nn.Embedding(len(VOCABULARY), 8), nn.Linear(8, len(VOCABULARY)))
    with pytest.raises(LoRAError, match=r"Sequential cannot be given packed rows.*unexpected keyword"):
        as_packed(without, {"input_ids": IDS, "position_ids": POSITIONS})


def test_the_trial_leaves_the_models_modes_and_the_random_numbers_alone():
    model = make_model("gpt2").train()
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    refuse_mixing(model, IDS)
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_documents_are_put_into_rows_of_their_own_while_there_is_room():
    batch = {"input_ids": torch.arange(12).view(2, 6), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1], [*range(6)]])}
    found = CausalLM().inputs(nn.Identity(), batch | {"labels": batch["input_ids"]})
    assert found["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def by_bounds(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_):
    """What flash attention does with the bounds that it is given, in plain torch; without bounds, each row is one."""
    b, _, t, _ = query.shape
    document = torch.arange(b).repeat_interleave(t)
    if cu_seq_lens_q is not None:
        assert (cu_seq_lens_q.dtype, int(cu_seq_lens_q.diff().max())) == (torch.int32, max_length_q)
        document = torch.arange(len(cu_seq_lens_q) - 1).repeat_interleave(cu_seq_lens_q.diff())
    document = document.view(b, t)
    seen = (document[:, :, None] == document[:, None]) & torch.ones(t, t, dtype=torch.bool).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], scale=scaling)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma"])
def test_models_hand_the_bounds_on_to_flash_attention(kind):
    transformers.AttentionInterface.register("bounds_as_flash", by_bounds)
    as_flash, sdpa = (make_model(kind, dtype=torch.float64) for _ in range(2))
    as_flash.config._attn_implementation = "bounds_as_flash"
    ids = torch.stack([IDS[0], IDS[0].flip(0)])
    positions = torch.cat([POSITIONS, torch.tensor([[*range(3), *range(ids.shape[1] - 3)]])])
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    one, two = (CausalLM().evaluate(model, batch) for model in (as_flash, sdpa))
    assert float(one.loss.detach()) == pytest.approx(float(two.loss.detach()), rel=1e-12)


SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 40, "pad_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "Bert": 40, "Roberta": 38, "XLMRoberta": 38, "MPNet": 38, "Electra": 40, "DebertaV2": 40, "Albert": 40,
    "ModernBert": None, "NomicBert": None,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_row_is_the_one_that_the_model_takes(family):
    """The vocabulary is as large as there are positions, which is not to be taken for them."""
    config = getattr(transformers, f"{family}Config")(**SIZES, bos_token_id=2, eos_token_id=3)
    model = getattr(transformers, f"{family}Model")(config).eval()
    limit = learned_positions(model)
    assert limit == FAMILIES[family]
    rows = torch.full((1, limit or 60), 5)
    refuse_too_long(model, {"input_ids": rows})
    model(input_ids=rows)
    if limit is not None:
        longer = torch.full((1, limit + 1), 5)
        with pytest.raises(LoRAError, match=f"a row of {limit + 1} tokens .* {limit} positions .*max_length"):
            refuse_too_long(model, {"anchor": {"input_ids": longer}})
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=longer)


def test_packed_rows_are_held_to_their_documents_positions():
    for model in (make_model("gpt2"), make_model("opt")):
        ids = torch.randint(3, len(VOCABULARY), (1, 80))
        refuse_too_long(model, {"input_ids": ids[:, :64]})
        refuse_too_long(model, {"input_ids": ids, "position_ids": torch.arange(40).repeat(1, 2)})
        with pytest.raises(LoRAError, match=r"a row of 65 tokens is longer than the 64 positions"):
            refuse_too_long(model, {"input_ids": ids[:, :65]})
