"""Texts with texts to make of them: articles and summaries, sentences and translations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from lightning.pytorch.utilities import rank_zero_warn
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lora_lightning.data.images.targets import TargetData, one_target_each, references_of, tokenize_up_to
from lora_lightning.data.io.rows import cells_of
from lora_lightning.data.io.splits import kind_of
from lora_lightning.lora.errors import LoRAError

REFERENCES = "references"


class SequenceToSequenceData(TargetData):
    """Files or a Hugging Face set to batches of source tokens and target tokens for an encoder and a decoder.

    In evaluation, rows of one source are written for once and held to all of their targets.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, also compressed), files by split, a directory, or a set on the hub;
            `package:NAME/path` is a file inside an installed package.
        tokenizer: a hub name, a directory or `package:NAME/path`.
        source_column: the text that is given.
        target_column: the text to make of it; or a list of texts, each as good.
        prefix: what is put before each source, such as `summarize: ` for T5.
        max_length: tokens per source at most; what is over is cut, with a warning of how many were.
        max_target_length: the same of targets.
        source_lang: of a tokenizer for many languages (mBART, NLLB), the sources' language code.
        target_lang: the targets' language code.
        table: arguments of `TableData` by name.

    Raises:
        LoRAError: a missing file or column, or a value that is no text.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        tokenizer: str,
        source_column: str = "source",
        target_column: str = "target",
        prefix: str = "",
        max_length: int = 512,
        max_target_length: int = 128,
        source_lang: str | None = None,
        target_lang: str | None = None,
        **table: Any,
    ) -> None:
        super().__init__(path, tokenizer, max_length, **table)
        for what, number in (("max_length", max_length), ("max_target_length", max_target_length)):
            if number < 2:
                raise LoRAError(f"{what} must be at least 2, a token and the end, got {number}")
        self.source_column, self.target_column, self.prefix = source_column, target_column, prefix
        self.max_target_length = max_target_length
        self.source_lang, self.target_lang = source_lang, target_lang

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loaded on first use, and told the languages."""
        tokenizer = super().tokenizer
        for attribute, value in (("src_lang", self.source_lang), ("tgt_lang", self.target_lang)):
            if value is not None and getattr(tokenizer, attribute, None) != value:
                setattr(tokenizer, attribute, value)
        return tokenizer

    def columns(self, split: str) -> Sequence[str | None]:
        return [self.source_column, None if kind_of(split) == "predict" else self.target_column]

    def check(self, table: datasets.Dataset, split: str) -> None:
        self.check_texts(table, split, [self.source_column])
        if kind_of(split) != "predict":
            self.check_targets(table, split, self.target_column)

    def filter(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        return table if kind_of(split) == "predict" else one_target_each(table, self.target_column)

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        if kind_of(split) in ("validation", "test"):
            references = references_of(list(cells_of(table, self.source_column, self.target_column)))
            table = table.add_column(REFERENCES, references)
        encoded = self.encode_by(
            encode_pairs,
            table,
            split,
            tokenizer=self.tokenizer,
            columns=(self.source_column, None if kind_of(split) == "predict" else self.target_column),
            prefix=self.prefix,
            max_lengths=(self.max_length, self.max_target_length),
        )
        for what, limit in (("source", "max_length"), ("target", "max_target_length")):
            cut = sum(encoded[f"{what}_cut"]) if f"{what}_cut" in encoded.column_names else 0
            if cut:
                rank_zero_warn(
                    f"{self.place(split)}: {cut} of {len(encoded)} {what}s are cut off by"
                    f" {limit}={getattr(self, limit)}"
                )
        return encoded.remove_columns([name for name in encoded.column_names if name.endswith("_cut")])

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        return PairCollator(self.tokenizer)


def encode_pairs(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, str | None],
    prefix: str,
    max_lengths: tuple[int, int],
) -> dict[str, Any]:
    """Token ids of sources and targets, which of them were cut, and the references as they are."""
    source, target = columns
    ids, cut = tokenize_up_to(tokenizer, [f"{prefix}{text}" for text in rows[source]], max_lengths[0])
    encoded: dict[str, Any] = {"input_ids": ids, "attention_mask": [[1] * len(own) for own in ids], "source_cut": cut}
    if target is not None:
        encoded["labels"], encoded["target_cut"] = tokenize_up_to(tokenizer, rows[target], max_lengths[1], target=True)
    if REFERENCES in rows:
        encoded[REFERENCES] = rows[REFERENCES]
    return encoded


@dataclass
class PairCollator:
    """`DataCollatorForSeq2Seq`, with the references beside it."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = [{key: value for key, value in row.items() if key != REFERENCES} for row in rows]
        padded = DataCollatorForSeq2Seq(self.tokenizer)(tokens)
        batch = {key: value for key, value in padded.items() if value is not None}  # labels are, of rows to predict
        if REFERENCES in rows[0]:
            batch[REFERENCES] = [row[REFERENCES] for row in rows]
        return batch
