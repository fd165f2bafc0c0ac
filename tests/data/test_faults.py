"""Bad data: one error in one line that names file, row and column, for every DataModule and kind of file."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import datasets
import pytest

from lora_lightning import LoRAError, TextClassificationData
from lora_lightning.data.classification import MultiLabelTextData, TextRegressionData
from lora_lightning.data.io.splits import SplitConfig
from tests.data.files import ready, write

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
TYPED = (".jsonl", ".parquet")  # files that tell numbers from text, and nothing from an empty text


@dataclasses.dataclass(frozen=True)
class Subject:
    """A DataModule with rows that are right."""

    cls: type
    row: Callable[[int], dict[str, Any]]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


def texts(i):
    return {"text": f"the film number {i}", "pair": "the end"}


PAIR = {"text_pair_column": "pair"}
SUBJECTS = {
    "classification": Subject(TextClassificationData, lambda i: {**texts(i), "label": ["dull", "fine"][i % 2]}, PAIR),
    "numbered": Subject(
        TextClassificationData, lambda i: {**texts(i), "label": i % 2}, {**PAIR, "label_names": ["dull", "fine"]}
    ),
    "regression": Subject(TextRegressionData, lambda i: {**texts(i), "label": i / 2}, PAIR),
    "labels": Subject(MultiLabelTextData, lambda i: {**texts(i), "labels": [["dull", "fine"][i % 2]]}, PAIR),
    "one text": Subject(MultiLabelTextData, lambda i: {**texts(i), "labels": ["dull;old", "fine"][i % 2]}, PAIR),
    "flags": Subject(
        MultiLabelTextData, lambda i: {**texts(i), "dull": i % 2, "old": 1}, {**PAIR, "label_columns": ["dull", "old"]}
    ),
}

# What is wrong with row 3 of a file: the subject, the column, what stands there, what is said, kinds of file.
CELLS = [
    *((name, "text", None, "expected text, got None", KINDS) for name in SUBJECTS if name != "labels"),
    *((name, "pair", None, "expected text, got None", KINDS) for name in SUBJECTS if name != "labels"),
    *((name, "text", 7, "expected text, got 7", (".jsonl",)) for name in SUBJECTS),
    ("classification", "label", None, "expected a label, a name or a number, got None", KINDS),
    ("classification", "label", ["fine"], r"expected a label, a name or a number, got \['fine'\]", (".jsonl",)),
    ("classification", "label", 5, "expected a name, as in the rows before, got 5", (".jsonl",)),
    ("numbered", "label", None, "expected a label, a name or a number, got nan|got None", KINDS),
    ("numbered", "label", 2, "expected one of the labels dull, fine, as 0 to 1, got 2", KINDS),
    ("numbered", "label", -1, "expected one of the labels dull, fine, as 0 to 1, got -1", KINDS),
    ("numbered", "label", "fine", "expected a number, as in the rows before, got 'fine'", (".jsonl",)),
    ("regression", "label", None, "expected a finite number, got None", KINDS),
    ("regression", "label", math.nan, "expected a finite number, got (nan|None)", KINDS),
    ("regression", "label", math.inf, "expected a finite number, got inf", KINDS),
    ("regression", "label", "high", "expected a finite number, got 'high'", (".csv", ".tsv", ".jsonl")),
    ("regression", "label", True, "expected a finite number, got True", (".jsonl",)),
    ("regression", "label", [1.0], r"expected a finite number, got \[1.0\]", (".jsonl",)),
    ("labels", "labels", {"a": 1}, "expected a list of labels, or labels with ';' between, got {'a': 1}", (".jsonl",)),
    ("labels", "labels", [["fine"]], "expected a list of labels, or labels with ';' between", (".jsonl",)),
    ("labels", "labels", 1.5, "expected a list of labels, or labels with ';' between, got 1.5", (".jsonl",)),
    ("flags", "old", 2, "expected 0 or 1, got 2", KINDS),
    ("flags", "old", None, "expected 0 or 1, got (nan|None)", KINDS),
]  # fmt: skip
SPLIT = SplitConfig(validation=0.0, test=0.0)
NAMED_WITH = {"text": "text", "pair": "text_pair", "label": "(label|number)", "labels": "label"}
"""The argument that says what a column is called, less its `_column`; one of 0 and 1 has none of its own."""


def rows_of(subject, n=8):
    return [subject.row(i) for i in range(n)]


def kinds_of(name):
    return TYPED if name == "labels" else KINDS


def refused(subject, path, bert):
    """The one line with which a set is refused."""
    with pytest.raises(LoRAError) as caught:
        ready(subject.cls, path, bert, split=SPLIT, **subject.kwargs)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_is_right_is_taken(name, tmp_path, bert):
    for kind in kinds_of(name):
        subject = SUBJECTS[name]
        data = ready(
            subject.cls, write(tmp_path / f"films{kind}", rows_of(subject)), bert, split=SPLIT, **subject.kwargs
        )
        assert len(data.encoded_rows("train")) == 8


@pytest.mark.parametrize(
    ("name", "column", "cell", "said", "kind"),
    [(*case[:4], kind) for case in CELLS for kind in case[4]],
    ids=lambda value: str(value)[:12],
)
def test_a_bad_cell_is_named_by_file_row_and_column(name, column, cell, said, kind, tmp_path, bert):
    subject = SUBJECTS[name]
    rows = rows_of(subject)
    rows[2] = {**rows[2], column: cell}
    message = refused(subject, write(tmp_path / f"films{kind}", rows), bert)
    assert re.search(rf"^films\{kind}, the train set, row 3, column '{column}': .*({said})", message), message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "column", "cell", "near"),
    [
        ("classification", "label", "fin", "got 'fin'; did you mean 'fine'?"),
        ("one text", "labels", "old; fin", "got 'fin'; did you mean 'fine'?"),
        ("labels", "labels", ["fine", "awful"], "got 'awful'"),
    ],
)
def test_a_label_that_training_never_saw_is_named_in_the_file_that_has_it(
    kind, name, column, cell, near, tmp_path, bert
):
    if kind not in kinds_of(name):
        return
    subject = SUBJECTS[name]
    write(tmp_path / f"train{kind}", rows_of(subject))
    write(tmp_path / f"dev_old{kind}", [subject.row(0), {**subject.row(1), column: cell}])
    message = refused(subject, tmp_path, bert)
    where = f"dev_old{kind}, the validation_old set, row 2, column '{column}': expected one of the labels dull, fine"
    assert message.startswith(where), message
    assert near in message


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_column_that_is_missing_is_named_with_the_file(name, tmp_path, bert):
    subject = SUBJECTS[name]
    for kind in kinds_of(name):
        for column in subject.row(0):
            rows = [
                {f"{key}s" if key == column else key: value for key, value in row.items()} for row in rows_of(subject)
            ]
            message = refused(subject, write(tmp_path / f"{column}{kind}", rows), bert)
            assert f"{column}{kind}, the train set, has no column '{column}'; did you mean '{column}s'?" in message
            told = rf" say so with {NAMED_WITH[column]}_column" if column in NAMED_WITH else ""
            assert re.search(rf"'{column}s'\?{told} \(columns: ", message), message


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_rows_is_named(name, kind, tmp_path, bert):
    subject, file = SUBJECTS[name], tmp_path / f"films{kind}"
    file.touch()
    assert re.search(rf"films\{kind} is empty", refused(subject, file, bert))
    if kind == ".parquet":
        datasets.Dataset.from_list(rows_of(subject)).select([]).to_parquet(file)
    else:
        file.write_text("\n" if kind == ".jsonl" else "text,label\n")
    assert re.search(rf"films\{kind} holds no rows", refused(subject, file, bert))


# Files that no reader takes as they are: name, bytes, what is said of them.
BROKEN = [
    ("a.jsonl", b'{"text": "a", "label": "x"}\n\n{"text": "b", "lab', r"row 2: expected an object .* not JSON"),
    ("b.jsonl", b'{"text": "a", "label": "x"}\n["b", "y"]\n', r'row 2: expected an object .* got \["b", "y"\]'),
    ("c.jsonl", b'{"text": "a", "label": "x"}\n{"text": "\xe9", "label": "x"}\n', r"row 2: not UTF-8 \(byte 0xe9\)"),
    ("d.json", b'[{"text": "a", "label": "x"}, {"text": "b", ', r"is not JSON \(.*line 1"),
    ("e.json", b'[{"text": "a", "label": "x"}, 7]', "row 2: expected an object .* got 7"),
    ("f.csv", b"text,label\na,x\nb,c,y\n", r"row 2: expected 2 fields \(text, label\), got 3"),
    ("l.csv", b"text,label\na,b,x\nc,d,y\n", r"row 1: expected 2 fields \(text, label\), got 3; a text with ',' in it"),
    ("s.csv", b"text;label\na 1,5;x\nb;y\n", r"row 1: expected 1 fields .* seem to be separated by ';'"),
    ("g.tsv", b"text\tlabel\na\tx\nb\tc\ty\n", r"row 2: expected 2 fields \(text, label\), got 3"),
    ("h.csv", b'text,label\na,x\n"b,y\nc,x\n', "row 2: a quotation mark opens a text and none closes it"),
    ("i.csv", b"text,label\na,x\ncaf\xe9,x\n", r"row 2: not UTF-8 \(byte 0xe9\): save the file as UTF-8"),
    ("j.csv", b"text,label\na,x\nb\n", r"the train set, row 2, column 'label': expected a label"),
    ("k.parquet", b"PAR1 and no more", "cannot be read as parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_broken_file_is_named_with_the_row_that_breaks_it(name, content, said, tmp_path, bert):
    (tmp_path / name).write_bytes(content)
    message = refused(Subject(TextClassificationData, texts), tmp_path / name, bert)
    assert re.search(rf"{name}.*{said}", message), message


def test_a_broken_file_is_found_out_under_its_compression(tmp_path, bert):
    import gzip

    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,label\na,x\nb,c,y\n"))
    assert "row 2: expected 2 fields" in refused(Subject(TextClassificationData, texts), tmp_path / "a.csv.gz", bert)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"text,label\na,x\n")[:-6])
    assert "cannot be read as csv" in refused(Subject(TextClassificationData, texts), tmp_path / "b.csv.gz", bert)


def test_numbers_may_be_written_as_text_and_lists_may_be_empty(tmp_path, bert):
    rows = [{"text": "a", "label": json.dumps(i)} for i in range(4)]
    data = ready(TextRegressionData, write(tmp_path / "a.jsonl", rows), bert, split=SPLIT)
    assert list(data.encoded_rows("train")["labels"]) == [0.0, 1.0, 2.0, 3.0]


def test_label_names_are_each_another(tmp_path, bert):
    with pytest.raises(LoRAError, match="label_names holds a name twice"):
        _ = TextClassificationData("unused", str(bert), label_names=["a", "a"]).label_names
