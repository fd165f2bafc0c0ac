"""Sources and targets become batches; a source with several targets is written for once."""

import pytest
import torch

from lora_lightning import LoRAError
from lora_lightning.data.chat.prompt_completion import PromptCompletionData
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.data.seq2seq import SequenceToSequenceData
from tests.tiny_text import make_tokenizer, write_rows

ROWS = [
    {"context": "name : Zizzi", "completion": "Zizzi is a place ."},
    {"context": "name : Cotto | area : riverside", "completion": "Cotto is in the riverside ."},
    {"context": "name : Zizzi", "completion": "a place is Zizzi ."},
]


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    make_tokenizer(folder, ends=True)
    return str(folder)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    make_tokenizer(folder, ends=False)
    return str(folder)


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


OPTIONS = {"split": SplitConfig(validation=0, test=0), "batch_size": 3, "length_grouped": False}


def pairs_of(path, tokenizer, **kwargs):
    columns = {"source_column": "context", "target_column": "completion"}
    return ready(SequenceToSequenceData(path, tokenizer, **(OPTIONS | columns | kwargs)))


def prompts_of(path, tokenizer, **kwargs):
    templates = {"prompt": "{context} </s>", "completion": "{completion}"}
    return ready(PromptCompletionData(path, tokenizer, **(OPTIONS | templates | kwargs)))


def three(tmp_path, rows=ROWS):
    return {split: write_rows(tmp_path / f"{split}.jsonl", rows) for split in ("train", "validation", "test")}


def test_pairs_become_sources_and_targets_that_end(tmp_path, t5):
    data = pairs_of(three(tmp_path), t5, prefix="place : ")
    tokens = data.tokenizer.convert_ids_to_tokens
    row = data.encoded_rows("train")[0]
    assert set(row) == {"input_ids", "attention_mask", "labels"}
    assert tokens(row["input_ids"]) == ["place", ":", "name", ":", "Zizzi", "</s>"]
    assert tokens(row["labels"]) == ["Zizzi", "is", "a", "place", ".", "</s>"]
    batch = data.collate([data.encoded_rows("train")[i] for i in range(3)])
    assert torch.equal(batch["labels"][1] != -100, torch.ones(7, dtype=torch.bool))
    assert batch["labels"][0, -1] == -100
    assert batch["input_ids"][0, -1] == data.pad_token_id


@pytest.mark.parametrize("make", [pairs_of, prompts_of], ids=["pairs", "prompts"])
def test_a_source_is_written_for_once_and_held_to_all_of_its_targets(tmp_path, t5, gpt2, make):
    data = make(three(tmp_path), gpt2 if make is prompts_of else t5)
    assert "references" not in data.encoded_rows("train").column_names
    expected = [["Zizzi is a place .", "a place is Zizzi ."], ["Cotto is in the riverside ."], []]
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert batch["references"] == expected
        assert len(batch["labels"]) == 3, "the loss is over every pair"


@pytest.mark.parametrize("make", [pairs_of, prompts_of], ids=["pairs", "prompts"])
def test_a_list_of_targets_is_one_row_for_each(tmp_path, t5, gpt2, make):
    lists = [
        {"context": ROWS[0]["context"], "completion": [ROWS[0]["completion"], ROWS[2]["completion"]]},
        {"context": ROWS[1]["context"], "completion": [ROWS[1]["completion"]]},
    ]
    data = make(three(tmp_path, lists), gpt2 if make is prompts_of else t5)
    assert len(data.encoded_rows("train")) == 3
    assert list(data.encoded_rows("test")["references"]) == [
        ["Zizzi is a place .", "a place is Zizzi ."], [], ["Cotto is in the riverside ."],
    ]  # fmt: skip


def test_the_loss_is_on_the_completion_and_its_end(tmp_path, gpt2):
    data = prompts_of(three(tmp_path), gpt2)
    tokens = data.tokenizer.convert_ids_to_tokens
    row = data.encoded_rows("train")[0]
    assert tokens(row["input_ids"]) == ["name", ":", "Zizzi", "</s>", "Zizzi", "is", "a", "place", ".", "</s>"]
    trained = [i for i, label in enumerate(row["labels"]) if label != -100]
    assert trained == [4, 5, 6, 7, 8, 9]
    assert [row["labels"][i] for i in trained] == [row["input_ids"][i] for i in trained]


def test_whole_examples_are_padded_on_the_right_and_prompts_on_the_left(tmp_path, gpt2):
    batch = next(iter(prompts_of(three(tmp_path), gpt2).val_dataloader()))
    real, prompt = batch["attention_mask"].bool(), batch["prompt_attention_mask"].bool()
    assert real[:, 0].all()
    assert prompt[:, -1].all()
    assert prompt.sum(1).tolist() == [4, 8, 4]
    assert (batch["prompt_input_ids"][:, -1] == 1).all(), "each prompt's own last token is the last of its row"
    assert (batch["labels"][~real] == -100).all()


@pytest.mark.parametrize("make", [pairs_of, prompts_of], ids=["pairs", "prompts"])
def test_rows_to_predict_need_no_target(tmp_path, t5, gpt2, make):
    only = write_rows(tmp_path / "predict.jsonl", [{"context": row["context"]} for row in ROWS])
    data = make({"predict": only}, gpt2 if make is prompts_of else t5)
    batch = next(iter(data.predict_dataloader()))
    assert len(next(iter(batch.values()))) == 3
    assert not {"labels", "references"} & set(batch)


def test_what_is_too_long_is_cut_and_said(tmp_path, t5, gpt2):
    files = {"train": write_rows(tmp_path / "train.jsonl", ROWS)}
    data = pairs_of(files, t5, max_length=5, max_target_length=6)
    sources, targets = data.data_summary["warnings"]
    assert "33% of the sources in train are cut at 5 tokens: raise data.init_args.max_length" in sources
    assert "33% of the targets in train are cut at 6 tokens: raise data.init_args.max_target_length" in targets
    tokens = data.tokenizer.convert_ids_to_tokens(data.encoded_rows("train")[1]["labels"])
    assert tokens == ["Cotto", "is", "in", "the", "riverside", "</s>"]
    data = prompts_of(files, gpt2, max_length=10)
    assert data.data_summary["cut"]["train"] == {"prompts cut": 1 / 3, "completions cut": 0}
    tokens = data.tokenizer.convert_ids_to_tokens(data.encoded_rows("train")[1]["input_ids"])
    assert tokens == [":", "riverside", "</s>", "Cotto", "is", "in", "the", "riverside", ".", "</s>"]


@pytest.mark.parametrize(
    ("make", "rows", "said"),
    [
        (pairs_of, [ROWS[0], {"context": None, "completion": "x"}], r"train.jsonl, .*row 2, column 'context': .*None"),
        (pairs_of, [ROWS[0], {"context": "x", "completion": None}], r"row 2, column 'completion': expected text, or a"),
        (pairs_of, [{"context": "x", "completion": []}], r"row 1, column 'completion': .* got \[\]"),
        (pairs_of, [{"context": "x", "target": "y"}], r"no column 'completion'"),
        (prompts_of, [ROWS[0], {"context": None, "completion": "x"}], r"row 2, column 'context': .*number, got None"),
        (prompts_of, [{"context": "x", "completion": 3}], r"row 1, column 'completion': expected text, .* got 3"),
    ],
)
def test_a_fault_names_file_row_and_column(tmp_path, t5, gpt2, make, rows, said):
    with pytest.raises(LoRAError, match=said):
        make({"train": write_rows(tmp_path / "train.jsonl", rows)}, gpt2 if make is prompts_of else t5)


@pytest.mark.parametrize(
    ("templates", "said"),
    [
        ({"prompt": "no column"}, "prompt must have a column in braces"),
        ({"prompt": "{context"}, r"prompt is no template: .*'\{context'"),
        ({"prompt": "{context.x}"}, "braces must hold a column's name and nothing else"),
        ({"prompt": "{kontext}"}, "no column 'kontext'; did you mean 'context'"),
        ({"completion": "{context} {completion}"}, "completion must have one column"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(tmp_path, gpt2, templates, said):
    with pytest.raises(LoRAError, match=said):
        prompts_of({"train": write_rows(tmp_path / "train.jsonl", ROWS)}, gpt2, **templates)


def test_a_prompt_without_tokens_is_named(tmp_path, gpt2):
    rows = [ROWS[0], {"context": "", "completion": "x"}]
    with pytest.raises(LoRAError, match=r"row 2, column 'context': expected a prompt of at least one token"):
        prompts_of({"train": write_rows(tmp_path / "train.jsonl", rows)}, gpt2, prompt="{context}")
