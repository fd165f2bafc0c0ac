"""Sources and targets become batches; a source with several targets is written for once."""

import pytest

from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.data.seq2seq import PromptCompletionData, SequenceToSequenceData
from tests.data.files import ALL, ready, rows_of, write

ROWS = [
    {"context": "name : Zizzi", "completion": "Zizzi is a place ."},
    {"context": "name : Cotto | area : riverside", "completion": "Cotto is in the riverside ."},
    {"context": "name : Zizzi", "completion": "a place is Zizzi ."},
]
OPTIONS = {"split": ALL, "batch_size": 3, "length_grouped": False}


@pytest.fixture
def pairs_of(tokenizers):
    options = OPTIONS | {"source_column": "context", "target_column": "completion"}
    return lambda path, **more: ready(SequenceToSequenceData, path, tokenizers.t5, **options | more)


@pytest.fixture
def prompts_of(tokenizers):
    options = OPTIONS | {"prompt": "{context} </s>", "completion": "{completion}"}
    return lambda path, **more: ready(PromptCompletionData, path, tokenizers.gpt2, **options | more)


@pytest.fixture(params=["pairs_of", "prompts_of"])
def make(request):
    return request.getfixturevalue(request.param)


def three(tmp_path, rows=ROWS):
    return {split: write(tmp_path / f"{split}.jsonl", rows) for split in ("train", "validation", "test")}


def test_pairs_become_sources_and_targets_that_end(tmp_path, pairs_of):
    data = pairs_of(three(tmp_path), prefix="place : ")
    tokens = data.tokenizer.convert_ids_to_tokens
    row, batch = data.encoded_rows("train")[0], rows_of(data)
    assert tokens(row["input_ids"]) == ["place", ":", "name", ":", "Zizzi", "</s>"]
    assert tokens(row["labels"]) == ["Zizzi", "is", "a", "place", ".", "</s>"]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert (batch["labels"] != -100).sum(1).tolist() == [6, 7, 6]
    assert batch["input_ids"][0, -1] == data.pad_token_id
    data.tokenizer.padding_side = "left"
    assert rows_of(data)["labels"].equal(batch["labels"]), "a decoder starts with the first token"


def test_a_source_is_written_for_once_and_held_to_all_of_its_targets(tmp_path, make):
    data = make(three(tmp_path))
    assert "references" not in data.encoded_rows("train").column_names
    expected = [["Zizzi is a place .", "a place is Zizzi ."], ["Cotto is in the riverside ."], []]
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert batch["references"] == expected
        assert len(batch["labels"]) == 3, "the loss is over every pair"


def test_a_list_of_targets_is_one_row_for_each(tmp_path, make):
    lists = [
        {"context": ROWS[0]["context"], "completion": [ROWS[0]["completion"], ROWS[2]["completion"]]},
        {"context": ROWS[1]["context"], "completion": [ROWS[1]["completion"]]},
    ]
    data = make(three(tmp_path, lists))
    assert len(data.encoded_rows("train")) == 3
    assert list(data.encoded_rows("test")["references"]) == [
        ["Zizzi is a place .", "a place is Zizzi ."], [], ["Cotto is in the riverside ."],
    ]  # fmt: skip
    many = write(tmp_path / "many.jsonl", [{"context": f"{i}", "completion": ["a", "b", "c"]} for i in range(10)])
    held_out = make({"train": many}, split=SplitConfig()).encoded_rows("test")
    assert list(held_out["references"]) == [["a", "b", "c"], [], []], "no source is in two splits"


def test_the_loss_is_on_completions_and_prompts_are_padded_on_the_left(tmp_path, prompts_of):
    data = prompts_of(three(tmp_path))
    ids, labels = (data.encoded_rows("train")[0][name] for name in ("input_ids", "labels"))
    tokens = data.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["name", ":", "Zizzi", "</s>", "Zizzi", "is", "a", "place", ".", "</s>"]
    assert labels == [*[-100] * 4, *ids[4:]]
    batch = next(iter(data.val_dataloader()))
    real, prompt = batch["attention_mask"].bool(), batch["prompt_attention_mask"].bool()
    assert real[:, 0].all()
    assert prompt.sum(1).tolist() == [4, 8, 4]
    assert (batch["prompt_input_ids"][:, -1] == 1).all(), "each prompt's own last token is the last of its row"
    assert (batch["labels"][~real] == -100).all()


def test_what_is_too_long_is_cut(tmp_path, pairs_of, prompts_of):
    files = {"train": write(tmp_path / "train.jsonl", ROWS)}
    data = pairs_of(files, max_length=5, max_target_length=6)
    tokens = data.tokenizer.convert_ids_to_tokens(data.encoded_rows("train")[1]["labels"])
    assert tokens == ["Cotto", "is", "in", "the", "riverside", "</s>"]
    data = prompts_of(files, max_length=10)
    tokens = data.tokenizer.convert_ids_to_tokens(data.encoded_rows("train")[1]["input_ids"])
    assert tokens == [":", "riverside", "</s>", "Cotto", "is", "in", "the", "riverside", ".", "</s>"]
