"""What the data would tell is told before the first step, each thing that is wrong with its cure."""

import csv
import io

import pytest
from rich.console import Console

from lora_lightning import (
    ChatData,
    LanguageModellingData,
    MultiLabelTextData,
    PairData,
    PreferenceData,
    PromptCompletionData,
    SequenceToSequenceData,
    TextClassificationData,
    TextRegressionData,
    TokenClassificationData,
)
from lora_lightning.data import base
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.lora.errors import LoRAError
from lora_lightning.reports.console import show_data
from tests.data.files import ALL, ready, write
from tests.tiny_pairs import make_tokenizer

ROWS = [
    ("the film is lovely and warm", "Billing"),
    ("the film is dull", "billing "),
    ("a story of two friends", "Billing"),
    ("   ", "billing "),
    ("a \0 story", "Billing"),
    ("its end is grim " * 10, "billing "),
    ("bright and clever", "rare"),
    ("a warm story", "Billing"),
]


def table(file, rows, header=("text", "label")):
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])
    return file


def summary_of(cls, path, tokenizer, **options):
    return ready(cls, path, tokenizer, **options).data_summary


def shown(summary):
    screen = Console(file=io.StringIO(), width=200)
    show_data(summary, screen)
    return screen.file.getvalue()


WRONG = {
    "1 of 2 rows of validation stand in train too": "remove them",
    "'Billing', 'billing ' differ by case or blanks only": "write them alike",
    "the label rare (1)": "add rows",
    "column 'text': 1 text is blank": "remove those rows",
    "column 'text': 1 text holds NUL bytes": "UTF-8",
    "12% of the texts in train are cut at 20 tokens": "max_length",
}


def test_rows_and_labels_are_counted_by_split_and_each_wrong_thing_is_one_line_with_its_cure(tiny, tmp_path):
    """Train has what is wrong; validation has a row of it, and test none."""
    path = {
        "train": table(tmp_path / "train.csv", ROWS),
        "validation": table(tmp_path / "validation.csv", [*ROWS[:1], ("two friends", "Billing")]),
        "test": table(tmp_path / "test.csv", [("the end", "Billing")]),
    }
    summary = summary_of(TextClassificationData, path, tiny.bert, max_length=20)
    assert summary["rows"] == {"train": 8, "validation": 2, "test": 1}
    assert summary["labels"]["train"] == {"Billing": 4, "billing ": 3, "rare": 1}
    assert summary["labels"]["test"] == {"Billing": 1, "billing ": 0, "rare": 0}
    cut = {split: shares["texts cut"] for split, shares in summary["cut"].items()}
    assert cut == {"train": 1 / 8, "validation": 0, "test": 0}
    assert summary["in_two_splits"] == {"validation in train": 1}
    screen = shown(summary)
    assert all(text in screen for text in ("train 8", "validation 2", "Billing 4", *summary["warnings"]))
    for wrong, cure in WRONG.items():
        (line,) = [line for line in summary["warnings"] if wrong in line]
        assert cure in line.partition(wrong)[2]
        assert "\n" not in line
    right = summary_of(TextClassificationData, tiny.reviews, tiny.bert, split=SplitConfig(group_by="film"))
    assert not [line for line in right["warnings"] if "stand in" not in line]
    torn = [(f"story {i // 2}", str(i % 2)) for i in range(40)]
    blank = [("a", " "), ("b", "x")] * 20
    for rows, said in ((torn, "split.group_by"), (blank, "the blank label ' '")):
        warned = summary_of(TextClassificationData, table(tmp_path / "all.csv", rows), tiny.bert)["warnings"]
        assert any(said in line for line in warned)


def test_a_column_that_stands_twice_is_an_error_where_it_is_used_else_a_warning(tiny, tmp_path):
    rows = [(text, label, 1) for text, label in ROWS]
    used = table(tmp_path / "used.csv", rows, ("text", "label", "label"))
    with pytest.raises(LoRAError, match=r"used.csv.*column 'label' twice: rename one"):
        ready(TextClassificationData, used, tiny.bert)
    beside = table(tmp_path / "beside.csv", [(*row, 2) for row in rows], ("text", "label", "note", "note"))
    warned = summary_of(TextClassificationData, beside, tiny.bert)["warnings"]
    assert [line for line in warned if "note twice" in line]


LONG, SHORT = " ".join(["story"] * 40), "a story"
HALF = {"texts cut": 0.5}
TEXTS = {
    TextClassificationData: ("text label", [(LONG, 0), (SHORT, 1)], HALF),
    MultiLabelTextData: ("text labels", [(LONG, ["a"]), (SHORT, [])], HALF),
    TextRegressionData: ("text label", [(LONG, 0.5), (SHORT, 1.5)], HALF),
    TokenClassificationData: ("tokens ner_tags", [(["story"] * 40, ["A"] * 40), (["a"], ["B"])], HALF),
    PairData: ("anchor positive", [(LONG, SHORT), (SHORT, "friends")], {"anchors cut": 0.5, "positives cut": 0.0}),
    SequenceToSequenceData: (
        "source target", [(SHORT, LONG), (SHORT, SHORT)], {"sources cut": 0.0, "targets cut": 0.5}
    ),
    PromptCompletionData: (
        "prompt completion", [(LONG, SHORT), (SHORT, LONG), (SHORT, SHORT), (LONG, SHORT)],
        {"prompts cut": 0.75, "completions cut": 0.25},
    ),
    PreferenceData: (
        "prompt chosen rejected", [(LONG, SHORT, "no"), (SHORT, LONG, "no"), (SHORT, SHORT, "no")],
        {"prompts cut": 1 / 3, "answers cut": 1 / 3},
    ),
    ChatData: ("question answer", [(SHORT, LONG), (SHORT, SHORT)], {"answers cut": 0.5}),
    LanguageModellingData: ("text", [(LONG,), (SHORT,)], {"documents in pieces": 0.5}),
}  # fmt: skip
"""Rows of each text task, and what of them is cut at 20 tokens."""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    text_tokenizer = make_tokenizer(folder)
    text_tokenizer.add_tokens(["a", "story", "of", "friends"])
    text_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("task", TEXTS)
def test_each_task_of_texts_tells_what_is_cut(task, tiny, words, tmp_path):
    columns, cells, expected = TEXTS[task]
    rows = [dict(zip(columns.split(), row, strict=True)) for row in cells]
    of_words = task in (PromptCompletionData, PreferenceData, ChatData, LanguageModellingData)
    further = {"max_target_length": 20} if task is SequenceToSequenceData else {}
    file, tokenizer = write(tmp_path / "train.jsonl", rows), words if of_words else tiny.bert
    data = ready(task, file, tokenizer, max_length=20, split=ALL, **further)
    summary = data.data_summary
    assert summary["cut"]["train"] == pytest.approx(expected)
    for what, share in expected.items():
        lines = [line for line in summary["warnings"] if f"of the {what.removesuffix(' cut')} in train are cut" in line]
        assert len(lines) == (share > 0 and what != "documents in pieces")
        assert all("at 20 tokens: raise data.init_args.max_" in line for line in lines)
    assert not {name for name in getattr(data.encoded_rows("train"), "column_names", []) if name.endswith("_cut")}
    screen = shown(summary)
    assert all(f"{what}: {share:.1%} of train" in screen for what, share in expected.items())


def test_rows_that_an_earlier_release_has_encoded_are_not_taken_from_the_cache(tiny, tmp_path, monkeypatch):
    """datasets caches by the hash of what it maps, which of an importable function is its name."""
    path = table(tmp_path / "train.csv", ROWS)
    prints = []
    for version in (2, 2, 1):
        monkeypatch.setattr(base, "VERSION", version)
        prints.append(ready(TextClassificationData, path, tiny.bert, split=ALL).encoded_rows("train")._fingerprint)
    assert prints[0] == prints[1] != prints[2]
