"""Files become batches of labels, of several labels and of numbers; sets keep their own names and numbers."""

from functools import partial

import datasets
import pytest
import torch

from lora_lightning import LoRAError, TextClassificationData, huggingface
from lora_lightning.data.classification import MultiLabelTextData, TextRegressionData
from lora_lightning.data.io.splits import SplitConfig
from tests.data.files import ALL, ready, save, sizes, write

ROWS = [{"text": f"the film number {i} is {'fine' if i % 2 else 'dull'}", "label": f"{i % 2}"} for i in range(30)]
NUMBERED = [{**row, "label": int(row["label"])} for row in ROWS]
NAMED = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
data_of = partial(ready, TextClassificationData)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_batches_cut_padded_and_tokenized_once(tmp_path, bert, suffix):
    path = write(tmp_path / f"set{suffix}", [*ROWS, {"text": "film " * 99, "label": "1"}])
    data, again = (data_of(path, bert, max_length=12) for _ in range(2))
    assert (data.label_names, data.num_classes) == (["0", "1"], 2)
    batches = list(data.train_dataloader())
    assert sorted({batch["input_ids"].shape[1] for batch in batches}) == [8, 12], "each to its own longest"
    batch = batches[1]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    words = data.tokenizer.convert_tokens_to_ids(["fine", "dull"])
    for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
        assert words[1 - int(label)] in ids.tolist()
    assert data.encoded_rows("train").cache_files == again.encoded_rows("train").cache_files


def test_a_folder_files_by_split_and_a_saved_set_are_taken_as_they_are(tmp_path, bert):
    parts = {"train": ROWS[:20], "dev": ROWS[20:24], "test": ROWS[24:]}
    (tmp_path / "set").mkdir()
    files = {name: write(tmp_path / "set" / f"{name}.jsonl", part) for name, part in parts.items()}
    for path in (tmp_path / "set", files):
        assert sizes(data_of(path, bert)) == {"train": 20, "validation": 4, "test": 6}
    saved = data_of(save(tmp_path / "saved", train=ROWS, validation=ROWS[:4]), bert)
    assert list(saved.tables["validation"]["text"]) == [row["text"] for row in ROWS[:4]]
    assert {"train", "validation", "test"} == set(saved.tables), "test is split off train where the set has none"


def test_a_sets_own_names_keep_their_numbers_and_hidden_labels_are_for_prediction(tmp_path, bert):
    hidden = [{**row, "label": -1} for row in NUMBERED[:5]]
    path = save(tmp_path / "glue", NAMED, train=NUMBERED, validation=NUMBERED[:6], test=hidden, unsupervised=hidden)
    data = data_of(path, bert, split=SplitConfig(test=0.2))
    assert data.label_names == ["bad", "good"]
    assert set(data.encoded_rows("train")["labels"]) == {0, 1}
    assert sizes(data) == {"train": 24, "validation": 6, "test": 6, "predict": 5}
    with pytest.raises(LoRAError, match="in the set's own order"):
        data_of(path, bert, label_names=["good", "bad"])
    data = data_of(write(tmp_path / "set.jsonl", NUMBERED), bert, label_names=["bad", "good"])
    assert sorted(set(data.encoded_rows("train")["labels"])) == [0, 1]


@pytest.mark.parametrize("names", [None, ["1", "2"]])
def test_where_names_are_numbers_rows_of_another_alone_are_refused(tmp_path, bert, names):
    train = write(tmp_path / "train.csv", [{"text": f"film {i} x", "label": 1 + i % 2} for i in range(8)])
    validation = write(tmp_path / "val.csv", [{"text": f"story {i} x", "label": 0} for i in range(4)])
    with pytest.raises(LoRAError, match=r"^val.csv, the validation set, row 1, column 'label': .* labels 1, 2, got 0$"):
        data_of({"train": train, "validation": validation}, bert, label_names=names)


def test_rows_are_dropped_as_asked_and_groups_stay_together(tmp_path, bert):
    rows = [{**row, "film": f"{i % 10}"} for i, row in enumerate(ROWS)]
    rows += [{"text": "too short", "label": "1", "film": "x"}, {"text": "a plot of it", "label": "plot", "film": "y"}]
    rows += [{"text": None, "label": "plot", "film": "y"}]  # what is dropped need not be right
    data = data_of(
        write(tmp_path / "set.csv", [*rows, rows[0]]), bert, min_words=3, drop_labels=["plot"], drop_duplicates=True,
        split=SplitConfig(validation=0.2, test=0.2, group_by="film"),
    )  # fmt: skip
    films = {split: set(table["film"]) for split, table in data.tables.items()}
    assert sum(len(t) for t in data.tables.values()) == 30
    assert not films["train"] & films["validation"]
    assert not films["train"] & films["test"]


NAMES = ["money", "sport", "tech"]
LABELS = [["sport"], ["money", "sport"], [], ["tech", "money"]]
SEVERAL = [{"text": f"the film {i}", "labels": LABELS[i % 4]} for i in range(40)]
COUNTED = [{**row, "labels": [NAMES.index(n) for n in row["labels"]]} for row in SEVERAL]
FLAGS = [{"text": r["text"], **{n: int(n in r["labels"]) for n in NAMES}} for r in SEVERAL]
FORMS = {
    "lists": (".jsonl", SEVERAL, {}),
    "lists of Parquet": (".parquet", SEVERAL, {}),
    "one text": (".csv", [{**row, "labels": " ;".join(row["labels"])} for row in SEVERAL], {}),
    "another sign": (".csv", [{**row, "labels": " |".join(row["labels"])} for row in SEVERAL], {"separator": "|"}),
    "a column each": (".csv", FLAGS, {"label_columns": NAMES}),
    "numbers": (".jsonl", COUNTED, {}),
    "numbers with names": (".jsonl", COUNTED, {"label_names": NAMES}),
    "a set's own": ("", SEVERAL, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_several_labels_gives_the_same_targets(form, tmp_path, bert):
    suffix, rows, options = FORMS[form]
    named = datasets.Sequence(datasets.ClassLabel(names=NAMES))
    features = datasets.Features(text=datasets.Value("string"), labels=named)
    path = write(tmp_path / f"set{suffix}", rows) if suffix else save(tmp_path / "saved", features, train=rows)
    data = ready(MultiLabelTextData, path, bert, split=ALL, **options)
    assert data.label_names == (["0", "1", "2"] if form == "numbers" else NAMES)
    found = [[int(flag) for flag in row] for row in data.encoded_rows("train")["labels"][:4]]
    assert found == [[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]]
    batch = next(iter(data.train_dataloader()))
    assert (batch["labels"].shape, batch["labels"].dtype) == ((4, 3), torch.float32)


SCORED = [{"one": f"the film is {'fine' if i % 2 else 'dull'}", "two": "the end", "score": i / 4} for i in range(30)]
PAIRS = {"text_column": "one", "text_pair_column": "two", "number_column": "score"}


@pytest.mark.parametrize(("suffix", "cell"), [(".csv", float), (".jsonl", str), (".jsonl", int), (".parquet", float)])
def test_numbers_of_pairs_of_texts_are_read_from_every_kind_of_file_and_cell(tmp_path, bert, suffix, cell):
    rows = [{**row, "score": cell(i) / 4 if cell is float else cell(i)} for i, row in enumerate(SCORED)]
    data = ready(TextRegressionData, write(tmp_path / f"set{suffix}", rows), bert, **PAIRS)
    batch = next(iter(data.train_dataloader()))
    assert batch["token_type_ids"].max() == 1
    scores = [label for split in ("train", "validation", "test") for label in data.encoded_rows(split)["labels"]]
    assert sorted(scores) == sorted(float(row["score"]) for row in rows)
    model = huggingface(str(bert), label_names=data.label_names)
    assert (model.config.num_labels, model.config.id2label, data.num_classes) == (1, {0: "score"}, 1)
