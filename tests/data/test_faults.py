"""Bad data: one error in one line that names file, row and column, for every DataModule and kind of file."""

import dataclasses
import gzip
import math
import random
import re
from collections.abc import Callable
from typing import Any

import datasets
import pytest

from lora_lightning import (
    ChatData,
    ImageData,
    ImageTextData,
    LanguageModellingData,
    LoRAError,
    PairData,
    PreferenceData,
    PromptCompletionData,
    SequenceToSequenceData,
    TextClassificationData,
    TokenClassificationData,
)
from lora_lightning.data.classification import MultiLabelTextData, TextRegressionData
from tests.chats import assistant, user
from tests.data.files import ALL, ready, write
from tests.pictures import picture

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
JSONL = (".jsonl",)
TYPED = (".jsonl", ".parquet")  # files that tell numbers from text, and nothing from an empty text


@dataclasses.dataclass(frozen=True)
class Subject:
    cls: type
    row: Callable[[int], dict[str, Any]]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = "bert"
    kinds: tuple[str, ...] = KINDS


def of_texts(cls, more, kinds=KINDS, **kwargs):
    row = lambda i: {"text": f"the film number {i}", "pair": "the end", **more(i)}  # noqa: E731
    return Subject(cls, row, {"text_pair_column": "pair", **kwargs}, kinds=kinds)


def two(i):
    return ["dull", "fine"][i % 2]


NAMES = {"label_names": ["dull", "fine"]}
ENDS = {"source_column": "context", "target_column": "completion"}
FILLED = {"prompt": "{context} </s>", "completion": "{completion}"}
SUBJECTS = {
    "classification": of_texts(TextClassificationData, lambda i: {"label": two(i)}),
    "numbered": of_texts(TextClassificationData, lambda i: {"label": i % 2}, **NAMES),
    "regression": of_texts(TextRegressionData, lambda i: {"label": i / 2}),
    "labels": of_texts(MultiLabelTextData, lambda i: {"labels": [two(i)]}, TYPED),
    "one text": of_texts(MultiLabelTextData, lambda i: {"labels": ["dull;old", "fine"][i % 2]}),
    "flags": of_texts(MultiLabelTextData, lambda i: {"dull": i % 2, "old": 1}, label_columns=["dull", "old"]),
    "tags": Subject(
        TokenClassificationData, lambda i: {"tokens": ["Ann", "saw"], "ner_tags": ["B-PER", "OB"[i % 2]]}, kinds=TYPED
    ),
    "texts": Subject(LanguageModellingData, lambda i: {"text": "one two three"}, {"max_length": 16}, "lm"),
    "stream": Subject(
        LanguageModellingData, lambda i: {"text": "one two"}, {"max_length": 16, "streaming": True}, "lm", JSONL
    ),
    "sources": Subject(SequenceToSequenceData, lambda i: {"context": "name", "completion": "a place"}, ENDS, "t5"),
    "prompts": Subject(PromptCompletionData, lambda i: {"context": "name", "completion": "a place"}, FILLED, "gpt2"),
    "pairs": Subject(PairData, lambda i: {"anchor": f"the sky {i}", "positive": "it is blue", "negative": "no idea"},
                     {"negative_column": "negative"}, "pairs"),
    "answers": Subject(PreferenceData, lambda i: {"prompt": "what", "chosen": "it is", "rejected": "no"}, {}, "pairs"),
    "messages": Subject(PreferenceData, lambda i: {
        "prompt": [user("what is")], "chosen": [assistant("it is")], "rejected": [assistant("no")]
    }, {}, "pairs", JSONL),
    "whole": Subject(PreferenceData, lambda i: {c: [user("what"), assistant(c)] for c in ("chosen", "rejected")},
                     {"prompt_column": None}, "pairs", JSONL),
    "chats": Subject(ChatData, lambda i: {"messages": [user("Hi."), assistant("Yes.")]}, {}, "chat", JSONL),
    "chat pairs": Subject(ChatData, lambda i: {"prompt": "a", "completion": "b"}, {}, "chat"),
    "images": Subject(ImageData, lambda i: {"image": f"{i}.png", "label": i % 2}, {"image_size": 16, **NAMES}, None),
    "named images": Subject(ImageData, lambda i: {"image": f"{i}.png", "label": two(i)}, {"image_size": 16}, None),
    "captions": Subject(ImageTextData, lambda i: {"image": f"{i}.png", "text": "the sky"}, {}, "clip"),
}  # fmt: skip

# What is wrong with row 3 of a file: the subject, the column, what stands there, what is said, kinds of file.
CELLS = [
    *((name, "text", None, "expected text, got None", KINDS) for name in ("texts", "stream", "labels", "numbered")),
    *((name, "pair", None, "expected text, got None", KINDS) for name in ("regression", "flags")),
    ("classification", "text", 7, "expected text, got 7", JSONL),
    ("classification", "label", None, "expected a label, a name or a number, got None", KINDS),
    ("classification", "label", 5, "expected a name, as in the rows before, got 5", JSONL),
    ("numbered", "label", None, "expected a label, a name or a number, got nan|got None", KINDS),
    ("numbered", "label", 2, "expected one of the labels dull, fine, as 0 to 1, got 2", KINDS),
    ("numbered", "label", -1, "expected one of the labels dull, fine, as 0 to 1, got -1", KINDS),
    ("numbered", "label", "fine", "expected a number, as in the rows before, got 'fine'", JSONL),
    ("regression", "label", None, "expected a finite number, got None", KINDS),
    ("regression", "label", math.inf, "expected a finite number, got inf", KINDS),
    ("regression", "label", "high", "expected a finite number, got 'high'", (".csv", ".tsv", ".jsonl")),
    ("regression", "label", True, "expected a finite number, got True", JSONL),
    ("labels", "labels", {"a": 1}, "expected a list of labels, or labels with ';' between, got {'a': 1}", JSONL),
    ("flags", "old", 2, "expected 0 or 1, got 2", KINDS),
    ("flags", "old", None, "expected 0 or 1, got (nan|None)", KINDS),
    ("tags", "ner_tags", ["O"], "2 tags", TYPED),
    ("tags", "ner_tags", [None, "O"], "expected a tag for each word", TYPED),
    ("tags", "tokens", [], "expected a list of at least one word", TYPED),
    ("tags", "tokens", "Ann saw", "expected a list.*got 'Ann saw'", JSONL),
    ("tags", "tokens", ["a", None], "expected words, got None", TYPED),
    ("sources", "context", None, "None", KINDS),
    ("sources", "completion", None, "expected text, or a", KINDS),
    ("prompts", "context", None, "number, got None", KINDS),
    ("prompts", "completion", 3, "expected text, .* got 3", JSONL),
    ("pairs", "anchor", None, "expected a text with words in it", KINDS),
    ("pairs", "positive", "  ", "expected a text with words in it, got '  '", JSONL),
    ("pairs", "negative", "it is blue", "expected another text", KINDS),
    ("answers", "chosen", " ", "expected an answer with words in it", JSONL),
    ("answers", "rejected", None, "expected text, got None", KINDS),
    ("messages", "chosen", [{"role": None, "content": "it"}], "expected messages, a list of {role, content}", JSONL),
    ("messages", "prompt", [], "expected messages", JSONL),
    ("whole", "rejected", [user("how"), assistant("it")], "expected the messages of 'chosen' but for the last", JSONL),
    ("chats", "messages", [], r"expected at least one message, got \[\]", JSONL),
    ("chats", "messages", "Hi.", "expected a list of messages", JSONL),
    ("chats", "messages", [user("Hi."), {"role": "asistant", "content": "x"}], "did you mean 'assistant'", JSONL),
    ("chats", "messages", [user(None), assistant("x")], "content of message 1 to be text, got None", JSONL),
    ("chats", "messages", [user("Hi.")], r"expected a message of the role assistant, got \['user'\]", JSONL),
    *(
        ("chats", "messages", cell, said, JSONL)
        for cell, said in [
            (["Hi."], "message 1 to be a mapping"),
            ([{"content": "Hi."}], "role of message 1"),
            ([user([{"type": "image", "url": "x"}])], "content of message 1 to be text"),
            ([{"role": "assistant", "content": None, "tool_calls": "f"}], "tool_calls of message 1"),
            ([{"from": "function_call", "value": "f"}], "a function_call, to be JSON"),
        ]
    ),
    ("chat pairs", "completion", None, "expected text, got None", KINDS),
    *(
        (name, "image", *case)
        for name in ("images", "captions")
        for case in [
            ("nowhere.png", "'nowhere.png'.*no such file", KINDS),
            ("films.jsonl", "that opens, got 'films.jsonl'", JSONL),
            (None, "expected the path of an image, got None", KINDS),
            (7, "the path of an image", JSONL),
        ]
    ),
    ("captions", "text", " ", "expected a text with words", JSONL),
    ("images", "label", None, "expected a label", KINDS),
    ("images", "label", 3, "0 to 1, got 3", KINDS),
]  # fmt: skip
NAMED_WITH = {"text": "text", "pair": "text_pair", "label": "(label|number)", "labels": "label"}
"""The argument that says what a column is called, less its `_column`; one of 0 and 1 has none of its own."""


@pytest.fixture
def given(tokenizers, tmp_path):

    def make(name, rows, kind=None, file="films"):
        subject = SUBJECTS[name]
        if "image" in subject.row(0):
            for i in range(8):
                picture(random.Random(i), "red").save(tmp_path / f"{i}.png")
        path = rows if kind is None else write(tmp_path / f"{file}{kind}", rows)
        tokenizer = subject.tokenizer and getattr(tokenizers, subject.tokenizer)
        data = ready(subject.cls, path, tokenizer, split=ALL, **subject.kwargs)
        return list(data.streams["train"]) if name == "stream" else data

    return make


@pytest.fixture
def refused(given):

    def make(*args, **kwargs):
        with pytest.raises(LoRAError) as caught:
            given(*args, **kwargs)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return make


def right(name, count=8):
    return [SUBJECTS[name].row(i) for i in range(count)]


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_is_right_is_taken(name, given):
    for kind in SUBJECTS[name].kinds:
        data = given(name, right(name), kind)
        assert len(data if isinstance(data, list) else data.tables["train"]) > 0


@pytest.mark.parametrize(
    ("name", "column", "cell", "said", "kind"),
    [(*case[:4], kind) for case in CELLS for kind in case[4] if kind in SUBJECTS[case[0]].kinds],
    ids=lambda value: str(value)[:12],
)
def test_a_bad_cell_is_named_by_file_row_and_column(name, column, cell, said, kind, refused):
    rows = right(name)
    rows[2] = {**rows[2], column: cell}
    message = refused(name, rows, kind)
    assert re.search(rf"^films\{kind}, the train set, row 3, column '{column}': .*({said})", message), message


@pytest.mark.parametrize(
    ("name", "column", "cell", "near"),
    [
        ("classification", "label", "fin", "dull, fine, got 'fin'; did you mean 'fine'?"),
        ("one text", "labels", "old; fin", "dull, fine, old, got 'fin'; did you mean 'fine'?"),
        ("labels", "labels", ["fine", "awful"], "dull, fine, got 'awful'"),
        ("tags", "ner_tags", ["B-PRE", "O"], "got 'B-PRE'; did you mean 'B-PER'"),
        ("named images", "label", "violet", "got 'violet'"),
    ],
)
def test_a_label_that_training_never_saw_is_named_in_the_file_that_has_it(name, column, cell, near, refused, tmp_path):
    for kind in SUBJECTS[name].kinds:
        train = write(tmp_path / f"train{kind}", right(name))
        dev = write(tmp_path / f"dev_old{kind}", [right(name)[0], {**right(name)[1], column: cell}])
        message = refused(name, {"train": train, "validation_old": dev})
        assert message.startswith(f"dev_old{kind}, the validation_old set, row 2, column '{column}': expected ")
        assert near in message


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name not in ("chats", "chat pairs", "whole")])
def test_a_column_that_is_missing_is_named_with_the_file(name, refused):
    for kind in SUBJECTS[name].kinds:
        for column in right(name)[0]:
            rows = [{f"{key}s" if key == column else key: cell for key, cell in row.items()} for row in right(name)]
            told = rf" say so with {NAMED_WITH[column]}_column" if column in NAMED_WITH else ""
            said = rf"^{column}\{kind}, the train set, has no column '{column}'.* '{column}s'\?"
            told = told if name in list(SUBJECTS)[:6] else ".*"
            assert re.search(rf"{said}{told} \(columns: ", refused(name, rows, kind, column))


TARGETS = {"label", "labels", "dull", "old", "ner_tags", "completion", "positive", "negative"}
"""What is not known of rows to predict."""


@pytest.mark.parametrize(
    "name", [name for name in SUBJECTS if TARGETS & set(SUBJECTS[name].row(0)) and "chat" not in name]
)
def test_rows_to_predict_need_no_targets(name, given, tmp_path):
    asked = [{column: cell for column, cell in row.items() if column not in TARGETS} for row in right(name)]
    for kind in SUBJECTS[name].kinds:
        files = {
            "train": write(tmp_path / f"train{kind}", right(name)),
            "predict": write(tmp_path / f"new{kind}", asked),
        }
        batch = next(iter(given(name, files).predict_dataloader()))
        assert {"labels", "references"}.isdisjoint(batch)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_file_without_rows_is_named(name, refused, tmp_path):
    for kind in SUBJECTS[name].kinds:
        file = tmp_path / f"films{kind}"
        file.touch()
        assert f"films{kind} is empty" in refused(name, file)
        if kind == ".parquet":
            datasets.Dataset.from_list(right(name)).select([]).to_parquet(file)
        else:
            file.write_text("\n" if kind == ".jsonl" else "text,label\n")
        assert re.search(rf"films\{kind}(, the train set)? holds no rows", refused(name, file))


# Files that no reader takes as they are: name, bytes, what is said of them.
BROKEN = [
    ("a.jsonl", b'{"text": "a", "label": "x"}\n\n{"text": "b", "lab', r"row 2: expected an object .* not JSON"),
    ("b.jsonl", b'{"text": "a", "label": "x"}\n["b", "y"]\n', r'row 2: expected an object .* got \["b", "y"\]'),
    ("c.jsonl", b'{"text": "a", "label": "x"}\n{"text": "\xe9", "label": "x"}\n', r"row 2: not UTF-8 \(byte 0xe9\)"),
    ("d.json", b'[{"text": "a", "label": "x"}, {"text": "b", ', r"is not JSON \(.*line 1"),
    ("e.json", b'[{"text": "a", "label": "x"}, 7]', "row 2: expected an object .* got 7"),
    ("l.csv", b"text,label\na,x\nb,c,y\n", r"row 2: expected 2 fields \(text, label\), got 3; a text with ',' in it"),
    ("s.csv", b"text;label\na 1,5;x\nb;y\n", r"row 1: expected 1 fields .* seem to be separated by ';'"),
    ("h.csv", b'text,label\na,x\n"b,y\nc,x\n', "row 2: a quotation mark opens a text and none closes it"),
    ("i.csv", b"text,label\na,x\ncaf\xe9,x\n", r"row 2: not UTF-8 \(byte 0xe9\): save the file as UTF-8"),
    ("j.csv", b"text,label,pair\na,x,b\nb\n", r"the train set, row 2, column '\w+': expected (a label|text)"),
    ("k.parquet", b"PAR1 and no more", "cannot be read as parquet"),
    ("m.csv.gz", gzip.compress(b"text,label\na,x\nb,c,y\n"), "row 2: expected 2 fields"),
    ("n.csv.gz", gzip.compress(b"text,label\na,x\n")[:-6], "cannot be read as csv"),
    ("o.doc", b"text,label\na,x\n", "no set|expected one of"),
    ("a.conll", b"Ann B-PER\nsaw\n", r"line 2: expected 2 fields .* got 1: 'saw'|line 1"),
    ("x.conll", b"Ann B-PER\nsaw O\n\nAnn X B-PER\n", "line 4: expected 2 fields as on the other lines, got 3"),
    ("c.conll", b"\n\n", "holds no words"),
    ("e.conll", b"caf\xe9 O\n", "no text in UTF-8"),
    ("stream.jsonl", b"no json\n", "the train set cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_broken_file_is_named_with_the_row_that_breaks_it(name, content, said, refused, tmp_path):
    (tmp_path / name).write_bytes(content)
    subject = {".conll": "tags"}.get((tmp_path / name).suffix, "stream" if "stream" in name else "classification")
    message = refused(subject, tmp_path / name)
    assert re.search(rf"{name}.*({said})", message), message


ROW = {"prompt": "what is", "chosen": "it is", "rejected": "no"}
LABELLED = [{"text": f"the film {i}", "label": f"{i % 2}"} for i in range(30)]
ALIKE = [{"text": f"{i}", "label": "x", "labels": "x", "tokens": ["a"], "ner_tags": ["O"], "n": 3} for i in range(20)]
ONE_LABEL = [
    (TextClassificationData, {}),
    (TextClassificationData, {"label_names": ["x", "y"]}),
    (MultiLabelTextData, {"label_names": ["x", "y"]}),
    (TokenClassificationData, {}),
    (TokenClassificationData, {"label_names": ["O", "B"]}),
    (TextRegressionData, {"number_column": "n"}),
]
BLANK = [
    (TextClassificationData, "bert", {"text": " ", "label": "a"}, "text"),
    (SequenceToSequenceData, "t5", {"source": " ", "target": "a"}, "source"),
    (SequenceToSequenceData, "t5", {"source": "a", "target": " "}, "target"),
    (PromptCompletionData, "gpt2", {"prompt": "a", "completion": " "}, "completion"),
    (LanguageModellingData, "lm", {"text": " "}, "text"),
]
ARGUMENTS = [
    (TextClassificationData, "bert", LABELLED, {"drop_labels": ["2"]}, "no row is labelled '2'"),
    (TextClassificationData, "bert", LABELLED, {"min_words": 99}, "no row of the train set is left"),
    (TextClassificationData, "bert", LABELLED, {"label_names": ["a", "a"]}, "label_names holds a name twice"),
    (TextClassificationData, "bert", None, {}, "no file"),
    (TextClassificationData, "bert", "package:no_such_package/x.csv", {}, "'no_such_package', which is not installed"),
    (MultiLabelTextData, "bert", LABELLED, {"label_columns": ["a"], "label_names": ["A"]}, "leave label_names out"),
    (MultiLabelTextData, "bert", LABELLED, {"separator": ""}, "separator must be what stands between"),
    *((cls, "bert", ALIKE, options, "set.jsonl.*(at least 2|the same label)") for cls, options in ONE_LABEL),
    *((cls, named, [row] * 9, {}, f"set.jsonl, the train set: expected texts in column '{column}', all are blank")
      for cls, named, row, column in BLANK),
    (LanguageModellingData, "lm", [{"text": "one"}] * 2, {"end_of_text": False}, "no row has two tokens, so there"),
    (LanguageModellingData, "lm", [{"text": "one two"}], {"max_length": 1}, "max_length must be at least 2"),
    (PairData, "pairs", right("pairs"), {"group_column": "movie"}, "no column 'movie'"),
    (PreferenceData, "pairs", [ROW], {"prompt_column": None}, "two texts do not say where their prompt ends"),
    (PreferenceData, "pairs", right("messages"), {"as_chat": True}, "as_chat is for columns of texts"),
    (PreferenceData, "pairs", [ROW], {"max_length": 8, "max_prompt_length": 8}, "to max_length - 1 = 7, got 8"),
    (PreferenceData, "lm", right("messages"), {}, "has no chat template"),
    (PromptCompletionData, "gpt2", right("prompts"), {"prompt": "no column"}, "prompt must have a column in braces"),
    (PromptCompletionData, "gpt2", right("prompts"), {"prompt": "{context"}, r"prompt is no template: .*'\{context'"),
    (PromptCompletionData, "gpt2", right("prompts"), {"prompt": "{context.x}"}, "a column's name and nothing else"),
    (PromptCompletionData, "gpt2", right("prompts"), {"prompt": "{kontext}"}, "'kontext'; did you mean 'context'"),
    (PromptCompletionData, "gpt2", right("prompts"), {"completion": "{context} {completion}"}, "must have one column"),
    (PromptCompletionData, "gpt2", [*right("prompts"), {"context": "", "completion": "x"}], {"prompt": "{context}"},
     r"row 9, column 'context': expected a prompt of at least one token"),
    (ChatData, "chat", [{"ask": "a", "reply": "b"}], {"columns": {"prompt": "ask", "answer": "repli"}},
     "no column 'repli'; did you mean 'reply'"),
    (ImageData, None, right("images"), {"reader": lambda path: ([0, 0], [1, 2, 3])}, r"reader: .*lengths \[2, 3\]"),
    (ImageData, None, right("images"), {"image_size": 0}, "image_size must be one number or height and width"),
    (ImageData, None, right("images"), {"mean": [0.5]}, "mean must be three numbers"),
    (ImageData, None, right("images"), {"crop_share": 0.0}, "crop_share must be above 0"),
    (ImageData, None, right("images"), {"max_train_rows": 0}, "max_train_rows must be at least 1"),
    (ImageTextData, "./nowhere", [{"image": "0.png", "text": "a"}], {}, "no processor"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "tokenizer", "rows", "options", "said"), ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_an_argument_that_does_not_fit_is_named(cls, tokenizer, rows, options, said, tokenizers, tmp_path):
    path = tmp_path / "nowhere.csv" if rows is None else rows
    if isinstance(rows, list):
        path = write(tmp_path / "set.jsonl", rows)
    for i in range(8):
        picture(random.Random(i), "red").save(tmp_path / f"{i}.png")
    with pytest.raises(LoRAError, match=said):
        ready(cls, path, getattr(tokenizers, str(tokenizer), tokenizer), **{"split": ALL} | options)
