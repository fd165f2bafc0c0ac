"""Sentences as lists of words, with one tag for each word; and CoNLL files of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lora_lightning.backbones.tokenizers import load_tokenizer
from lora_lightning.data.classification import LabelNames
from lora_lightning.data.io.tables import ROW, cells_of, values_of
from lora_lightning.data.text import TextData, tokenize_cut
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED
from lora_lightning.tasks.token_classification import OUTSIDE

SUFFIXES = (".conll", ".iob", ".iob2", ".bio", ".txt")
DOCUMENT = "-DOCSTART-"
"""The first field of a line that begins a document and has no word."""
REMARK = re.compile(r"#\s*(id|sent_id|text|newdoc|newpar|global)\b|#\s+\S+\s+=\s")
"""Comment lines of CoNLL-U and MultiCoNER about the sentence below."""

Line = tuple[int, list[str]]
"""A line's number, from 1, and its fields."""


class TokenClassificationData(LabelNames, TextData):
    """Files or a Hugging Face set to batches of token ids, label numbers and word beginnings.

    A word's label goes to its first token. In a row with a list of words and a list of tags (JSONL, Parquet, a set on
    the hub), tags are names or numbers. CoNLL files (.conll, .iob, .bio, .txt) have a word and its tag on each line.

    Args:
        words_column: a list of words.
        tags_column: a list of tags, one for each word.
        tag_field: the field of the tag in a line of CoNLL files, from 0; -1 is the last.
        label_names: names in the order of their numbers. By default the set's, else the sorted tags in train.
        label_all_pieces: give a word's label to all of its tokens in training; predictions and metrics use the first.
        texts: arguments of `TextData`. The tokenizer must be a fast one.
    """

    first_label = OUTSIDE

    def __init__(
        self,
        *texts: Any,
        words_column: str = "tokens",
        tags_column: str = "ner_tags",
        tag_field: int = -1,
        label_names: list[str] | None = None,
        label_all_pieces: bool = False,
        **table: Any,
    ) -> None:
        super().__init__(*texts, **table)
        self.words_column, self.tags_column, self.label_all_pieces = words_column, tags_column, label_all_pieces
        self.label_column = tags_column
        self.input_columns, self.target_columns, self.given_label_names = [words_column], [tags_column], label_names
        reader = partial(read_conll, words=words_column, tags=tags_column, tag_field=tag_field)
        self.readers = dict.fromkeys(SUFFIXES, reader)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use; byte-level ones such as RoBERTa's put a blank before each word."""
        tokenizer = super().tokenizer
        if getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = load_tokenizer(self.tokenizer_name, add_prefix_space=True)
        if not tokenizer.is_fast:
            raise LoRAError(
                f"{type(tokenizer).__name__} of '{self.tokenizer_name}' does not say which pieces are of which"
                " word: take a tokenizer of the fast kind, with a tokenizer.json"
            )
        return tokenizer

    def check(self, table: datasets.Dataset, split: str) -> None:
        for row, words in cells_of(table, ROW, self.words_column):
            if not isinstance(words, list) or not words:
                raise self.bad_cell(split, row, self.words_column, "a list of at least one word", words)
            if wrong := [word for word in words if not isinstance(word, str)]:
                raise self.bad_cell(split, row, self.words_column, "words", wrong[0], f" among them: {words[:4]}")

    def check_targets(self, table: datasets.Dataset, split: str) -> None:
        for row, words, tags in cells_of(table, ROW, self.words_column, self.label_column):
            if not isinstance(tags, list) or len(tags) != len(words):
                many = f", {len(tags)} of them" if isinstance(tags, list) else ""
                raise self.bad_cell(split, row, self.label_column, f"a list of {len(words)} tags", tags, many)
            if None in tags:
                raise self.bad_cell(split, row, self.label_column, "a tag for each word", tags)

    def labels_in(self, cell: list[Any]) -> list[Any]:
        return cell

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        options = {"tokenizer": self.tokenizer, "columns": (self.words_column, self.label_column)}
        options |= {"max_length": self.max_length, "all_pieces": self.label_all_pieces}
        numbers = None if split == "predict" else self.numbers(table, split)
        encoded = self.encode_by(encode_words, table, split, numbers=numbers, **options)
        self._warn_of_unseen_words(table, encoded, split)
        return encoded

    def _warn_of_unseen_words(self, table: datasets.Dataset, encoded: datasets.Dataset, split: str) -> None:
        total = sum(len(words) for words in values_of(table, self.words_column))
        seen = sum(number >= 0 for numbers in values_of(encoded, "word_ids") for number in numbers)
        if seen < total:
            why = "they are not trained on" if split == "train" else "they get no label, and no metric counts them"
            rank_zero_warn(
                f"{self.place(split)}: {total - seen} of {total} words are cut off by max_length={self.max_length} or"
                f" hold nothing that the tokenizer knows; {why}"
            )


def encode_words(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, str],
    numbers: dict[str, int] | None,
    all_pieces: bool,
    max_length: int,
) -> dict[str, Any]:
    """Token ids, and for each token the number of the word that begins with it (-1 for others) and its label.

    Rows to predict (`numbers` is None) keep their words in place of labels.
    """
    words_column, tags_column = columns
    words = rows[words_column]
    tokens, cut = tokenize_cut(tokenizer, max_length, text=words, is_split_into_words=True)
    encoded: dict[str, Any] = {**tokens, "text_cut": cut}
    pieces = [[-1 if word is None else word for word in tokens.word_ids(i)] for i in range(len(words))]
    encoded["word_ids"] = [
        [word if not i or word != of_tokens[i - 1] else -1 for i, word in enumerate(of_tokens)] for of_tokens in pieces
    ]
    if numbers is None:
        return {**encoded, "words": words}
    encoded["labels"] = [
        [IGNORED if word < 0 else numbers[str(tags[word])] for word in word_ids]
        for word_ids, tags in zip(pieces if all_pieces else encoded["word_ids"], rows[tags_column], strict=True)
    ]
    return encoded


def read_conll(file: str, words: str = "tokens", tags: str = "ner_tags", tag_field: int = -1) -> datasets.Dataset:
    """Read a row for each sentence, with a list of words and a list of tags: a line for each word, then a blank one.

    Fields are separated by tabs, or by blanks where the file has no tab. The word is the first, the tag that of the
    number `tag_field`. A file with one field per line has no tags.
    """
    sentences = list(_sentences(file))
    if not sentences:
        raise LoRAError(f"{file} holds no words")
    width = Counter(len(fields) for sentence in sentences for _, fields in sentence).most_common(1)[0][0]
    for number, fields in (line for sentence in sentences for line in sentence):
        if len(fields) != width:
            raise LoRAError(
                f"{file}, line {number}: expected {width} fields as on the other lines, got {len(fields)}:"
                f" {' '.join(fields)[:80]!r}"
            )
    rows = {words: [[fields[0] for _, fields in sentence] for sentence in sentences]}
    if width > 1:
        if not -width < tag_field < width or tag_field == 0:
            raise LoRAError(f"{file} has {width} fields a line: the tag cannot be field {tag_field}, counted from 0")
        rows[tags] = [[fields[tag_field] for _, fields in sentence] for sentence in sentences]
    return datasets.Dataset.from_dict(rows)


def _sentences(file: str) -> Iterator[list[Line]]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoRAError(f"{file} is no text in UTF-8: {error}") from error
    separator = "\t" if "\t" in text else None
    sentence: list[Line] = []
    # By "\n" alone: splitlines would also split at characters such as U+2028, which a word may contain.
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        line = line.rstrip("\r")  # noqa: PLW2901
        fields = [field.strip() for field in line.split(separator)]
        if not line.strip() or fields[0] == DOCUMENT:
            if sentence:
                yield sentence
            sentence = []
        elif sentence or not REMARK.match(line):
            sentence.append((number, fields))
