"""Texts to batches: every token is there, once; what cannot be used is named."""

from collections import Counter

import pytest
import torch

from lora_lightning import LoRAError
from lora_lightning.data.language_modelling import LanguageModellingData
from tests.data import files
from tests.data.files import ALL, ready
from tests.tiny_lm import make_texts, make_tokenizer

TEXTS = make_texts(40, longest=30)


@pytest.fixture
def data_of(tokenizers):
    options = {"split": ALL, "max_length": 16}
    return lambda path, tokenizer=tokenizers.lm, **more: ready(LanguageModellingData, path, tokenizer, **options | more)


def tokens_of(data):
    return Counter(i for row in data.encoded_rows("train")["input_ids"] for i in row)


def write(path, texts):
    if path.suffix == ".jsonl":
        return files.write(path, [{"text": text} for text in texts])
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("packing", [True, False])
def test_every_token_is_in_one_row_and_a_text_ends_where_that_is_asked(tmp_path, data_of, kind, packing):
    data = data_of(write(tmp_path / f"set.{kind}", TEXTS), packing=packing)
    words = data.tokenizer
    assert tokens_of(data) == Counter(i for text in TEXTS for i in [*words(text)["input_ids"], words.eos_token_id])
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "position_ids" if packing else "attention_mask"}
    first = batch["position_ids"] == 0 if packing else torch.arange(16) < 1
    assert bool((batch["labels"][first.expand_as(batch["labels"])] == -100).all())
    without = data_of(write(tmp_path / f"two.{kind}", ["one two three"] * 2), packing=packing, end_of_text=False)
    assert words.eos_token_id not in tokens_of(without)


@pytest.mark.parametrize(("by", "documents"), [("line", 3), ("paragraph", 2), ("document", 1)])
def test_a_txt_is_taken_by_line_by_paragraph_or_whole(tmp_path, data_of, by, documents):
    path = write(tmp_path / "set.txt", ["one two", "three four", "", "five six"])
    data = data_of(path, text_by=by, packing=False)
    assert len(data.encoded_rows("train")) == documents


def test_predictions_are_for_pieces_of_documents_in_the_order_of_the_file(tmp_path, data_of):
    write(tmp_path / "train.txt", TEXTS)
    write(tmp_path / "predict.txt", ["one " * 40, "", "two three"])
    data = data_of(tmp_path)
    batches = list(data.predict_dataloader())
    assert [d for batch in batches for d in batch["document"].tolist()] == [1, 1, 1, 2, 3]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == 41 + 1 + 3


def test_rows_of_a_single_token_are_named_and_left_out(tmp_path, data_of):
    path = write(tmp_path / "set.jsonl", ["one two", "three", "four five", "six"])
    with pytest.warns(UserWarning, match=r"set.jsonl, the train set: 2 of 4 rows have a single token.*: row 2, 4$"):
        data = data_of(path, end_of_text=False)
    assert tokens_of(data) == Counter([3, 4, 6, 7])


def test_a_tokenizer_without_an_end_of_text_is_named(tmp_path, data_of):
    words = make_tokenizer()
    words.eos_token = None
    words.save_pretrained(tmp_path / "words")
    with pytest.raises(LoRAError, match=r"has no end-of-text token: set data.init_args.end_of_text to false"):
        data_of(write(tmp_path / "set.txt", TEXTS), tmp_path / "words")
