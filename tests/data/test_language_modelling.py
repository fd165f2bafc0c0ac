"""Texts to batches: every token is there, once; what cannot be used is named."""

from collections import Counter

import pytest

from lora_lightning import LoRAError
from lora_lightning.data.language_modelling import LanguageModellingData
from tests.data import files
from tests.data.files import ALL, ready
from tests.tiny_lm import make_texts, make_tokenizer

TEXTS = make_texts(40, longest=30)


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers.lm


def data_of(path, tokenizer, **options):
    return ready(LanguageModellingData, path, tokenizer, **{"split": ALL, "max_length": 16} | options)


def write(path, texts):
    if path.suffix == ".jsonl":
        return files.write(path, [{"text": text} for text in texts])
    path.write_text("\n".join(texts) + "\n")
    return path


def tokens_of(loader):
    """All tokens of all batches, padding aside."""
    found = Counter()
    for batch in loader:
        real = batch["attention_mask"].bool() if "attention_mask" in batch else batch["input_ids"] != 2
        found.update(batch["input_ids"][real].tolist())
    return found


def expected(texts):
    words = make_tokenizer()
    return Counter(i for text in texts for i in [*words(text)["input_ids"], words.eos_token_id])


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_every_token_is_in_one_packed_row(tmp_path, tokenizer, kind):
    data = data_of(write(tmp_path / f"set.{kind}", TEXTS), tokenizer)
    assert tokens_of(data.train_dataloader()) == expected(TEXTS)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert bool((batch["labels"][batch["position_ids"] == 0] == -100).all())


def test_rows_of_their_own_train_on_the_same_tokens(tmp_path, tokenizer):
    path = write(tmp_path / "set.txt", TEXTS)
    packed, plain = data_of(path, tokenizer), data_of(path, tokenizer, packing=False)
    trained = [
        Counter(i for batch in d.train_dataloader() for i in batch["labels"].flatten().tolist() if i != -100)
        for d in (packed, plain)
    ]
    assert trained[0] == trained[1]
    assert set(next(iter(plain.train_dataloader()))) == {"input_ids", "labels", "attention_mask"}


def test_a_text_ends_with_the_end_of_text_where_that_is_asked(tmp_path, tokenizer):
    path = write(tmp_path / "set.txt", ["one two three"])
    ends = [data_of(path, tokenizer, packing=False, end_of_text=end).encoded_rows("train")[0] for end in (True, False)]
    assert ends[0]["input_ids"] == [3, 4, 5, 1]
    assert ends[0]["labels"] == [-100, 4, 5, 1]
    assert ends[1]["input_ids"] == [3, 4, 5]


@pytest.mark.parametrize(("by", "documents"), [("line", 3), ("paragraph", 2), ("document", 1)])
def test_a_txt_is_taken_by_line_by_paragraph_or_whole(tmp_path, tokenizer, by, documents):
    path = write(tmp_path / "set.txt", ["one two", "three four", "", "five six"])
    data = data_of(path, tokenizer, text_by=by, packing=False)
    assert len(data.encoded_rows("train")) == documents


def test_predictions_are_for_pieces_of_documents_in_the_order_of_the_file(tmp_path, tokenizer):
    write(tmp_path / "train.txt", TEXTS)
    write(tmp_path / "predict.txt", ["one " * 40, "", "two three"])
    data = data_of(tmp_path, tokenizer)
    batches = list(data.predict_dataloader())
    assert [d for batch in batches for d in batch["document"].tolist()] == [1, 1, 1, 2, 3]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == 41 + 1 + 3
    assert all("position_ids" not in batch for batch in batches)


def test_rows_of_a_single_token_are_named_and_left_out(tmp_path, tokenizer):
    path = write(tmp_path / "set.jsonl", ["one two", "three", "four five", "six"])
    with pytest.warns(UserWarning, match=r"set.jsonl, the train set: 2 of 4 rows have a single token.*: row 2, 4$"):
        data = data_of(path, tokenizer, end_of_text=False)
    assert tokens_of(data.train_dataloader()) == Counter([3, 4, 6, 7])


def test_a_tokenizer_without_an_end_of_text_is_named(tmp_path):
    words = make_tokenizer()
    words.eos_token = None
    words.save_pretrained(tmp_path / "words")
    with pytest.raises(LoRAError, match=r"has no end-of-text token: set data.init_args.end_of_text to false"):
        data_of(write(tmp_path / "set.txt", TEXTS), tmp_path / "words")
