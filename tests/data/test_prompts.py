"""What language models are asked, and what they go on from."""

import json

import datasets
import pytest

from lora_lightning import huggingface
from lora_lightning.data.chat.prompts import LONGEST, beginning_of, held_out_split, rows_from_all_over
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.data.language_modelling import LanguageModellingData
from lora_lightning.training.callbacks.generation_samples import generate_answers
from tests.chats import make_llama, make_tokenizer


def test_rows_are_from_all_over_and_no_more_than_there_are():
    table = datasets.Dataset.from_dict({"a": list(range(10))})
    assert rows_from_all_over(table, 3)["a"][:] == [0, 3, 6]
    assert rows_from_all_over(table, 10)["a"][:] == rows_from_all_over(table, 99)["a"][:] == list(range(10))


def test_prompts_are_held_out_where_anything_is():
    assert held_out_split({"train": 0, "validation": 0, "test": 0}) == "validation"
    assert held_out_split({"train": 0, "test": 0}) == "test"
    assert held_out_split({"train": 0}) == "train"


def test_a_text_is_asked_by_its_first_half():
    tokenizer = make_tokenizer(None)
    text = "What is it?  Is it so? The colour of the sky is blue."
    prompt = beginning_of(text, tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert prompt.input_ids == ids[: len(ids) // 2]
    assert "".join(tokenizer.decode(ids).split()) == "".join(f"{prompt.text}{prompt.reference}".split())
    assert len(beginning_of("sky " * 500, tokenizer).input_ids) == LONGEST
    assert len(beginning_of("a", tokenizer).input_ids) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_are_gone_on_with(tmp_path, streaming):
    make_llama(tmp_path / "llama", end="</s>")
    for split in ("train", "validation"):
        rows = [{"text": f"{split} {number}: the sky is blue, and the sea is blue as well."} for number in range(20)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    options = {"split": SplitConfig(validation=0, test=0), "max_length": 64, "streaming": streaming}
    data = LanguageModellingData(files, str(tmp_path / "llama"), **options)
    prompts = data.prompts(4)
    first = [prompt.text.split(":")[0] for prompt in prompts]
    assert first == [f"validation {number}" for number in (range(4) if streaming else range(0, 20, 5))]
    backbone = huggingface(str(tmp_path / "llama"), auto_class="AutoModelForCausalLM")
    said = generate_answers(backbone, data, prompts, 6)
    assert len(said) == 4
    assert data.stop_token_ids == [data.tokenizer.eos_token_id]
