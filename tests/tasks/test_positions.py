"""A row longer than the positions that a model has learnt is told in one sentence, whatever the task and the family."""

import pytest
import torch
import transformers

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.positions import learned_positions, refuse_too_long
from tests.tiny_lm import VOCABULARY, make_model

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
