"""CoNLL files: a word on each line with its tag beside it, a blank line after each sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets

from lora_lightning.lora.errors import LoRAError

SUFFIXES = (".conll", ".iob", ".iob2", ".bio", ".txt")
DOCUMENT = "-DOCSTART-"
"""The first field of a line that begins a document and has no word."""
REMARK = re.compile(r"#\s*(id|sent_id|text|newdoc|newpar|global)\b|#\s+\S+\s+=\s")
"""Comment lines of CoNLL-U and MultiCoNER about the sentence below."""

Line = tuple[int, list[str]]
"""A line's number, from 1, and its fields."""


def read_conll(file: str, words: str = "tokens", tags: str = "ner_tags", tag_field: int = -1) -> datasets.Dataset:
    """Read a row for each sentence, with a list of words and a list of tags.

    Fields are separated by tabs, or by blanks where the file has no tab. The word is the first. A file with one field
    per line has no tags.

    Args:
        words, tags: the columns' names.
        tag_field: the tag's field, from 0; -1 is the last.

    Raises:
        LoRAError: the file is no text in UTF-8, has no words, or a line has more or fewer fields than the others.
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
