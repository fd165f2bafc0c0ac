"""Source texts with target texts, for an encoder and a decoder, or as prompts with completions for a decoder alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from string import Formatter
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.io.splits import kind_of
from lora_lightning.data.io.tables import ROW, cells_of, values_of
from lora_lightning.data.text import TextData, pad_batch, tokenize_cut
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.generation import PROMPT
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED

REFERENCES = "references"


class TargetData(TextData):
    """A `TextData` whose rows have a target, or a list of targets: each makes an example with the row's source.

    In evaluation a text is generated once for each source and compared with all of its targets, the `REFERENCES`.
    """

    least_length = 2  # a token and the end

    @abstractmethod
    def pairs(self, table: datasets.Dataset) -> Sequence[tuple[str, str]]:
        """The source and the target of each row as texts."""

    def check_targets(self, table: datasets.Dataset, split: str) -> None:
        def is_right(cell: Any) -> bool:
            return cell != [] and all(isinstance(text, str) for text in (cell if isinstance(cell, list) else [cell]))

        self.check_cells(table, split, self.target_columns, "text, or a list of texts", is_right)

    def text_columns(self, table: datasets.Dataset, split: str) -> tuple[list[str], list[str]]:
        inputs, _ = super().text_columns(table, split)
        return inputs, [column for column in self.columns(split) if column not in (None, *inputs)]  # type: ignore[misc]

    def filter(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """The table with a row for each target, where the column has lists of them."""
        column = str(self.target_columns[0])
        targets = list(values_of(table, column))
        if not any(isinstance(texts, list) for texts in targets):
            return table
        rows = [i for i, texts in enumerate(targets) for _ in texts]
        flat = [text for texts in targets for text in texts]
        return table.select(rows).remove_columns(column).add_column(column, flat)

    def with_references(self, encoded: datasets.Dataset, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """Encoded rows, in evaluation with all targets of a source at its first row and none at its others."""
        if kind_of(split) not in ("validation", "test"):
            return encoded
        first: dict[str, int] = {}
        references: list[list[str]] = [[] for _ in range(len(table))]
        for row, (source, target) in enumerate(self.pairs(table)):
            references[first.setdefault(source, row)].append(target)
        return encoded.add_column(REFERENCES, references)


class SequenceToSequenceData(TargetData):
    """Files or a Hugging Face set to batches of source tokens and target tokens for an encoder and a decoder.

    Args:
        source_column: the input text.
        target_column: the output text, or a list of equally good texts.
        prefix: put before each source, such as `summarize: ` for T5.
        max_length: tokens per source at most; longer ones are cut.
        max_target_length: tokens per target at most.
        source_lang: of a tokenizer for many languages (mBART, NLLB), the sources' language code.
        target_lang: the targets' language code.
        texts: arguments of `TextData`.
    """

    cut_by: Mapping[str, str | None] = {"targets cut": "max_target_length"}

    def __init__(
        self,
        *texts: Any,
        source_column: str = "source",
        target_column: str = "target",
        prefix: str = "",
        max_length: int = 512,
        max_target_length: int = 128,
        source_lang: str | None = None,
        target_lang: str | None = None,
        **table: Any,
    ) -> None:
        super().__init__(*texts, max_length=max_length, **table)
        if max_target_length < self.least_length:
            raise LoRAError(f"max_target_length must be at least {self.least_length}, got {max_target_length}")
        self.source_column, self.target_column, self.prefix = source_column, target_column, prefix
        self.input_columns, self.target_columns = [source_column], [target_column]
        self.max_target_length = max_target_length
        self.source_lang, self.target_lang = source_lang, target_lang

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use, with the languages set."""
        tokenizer = super().tokenizer
        for attribute, value in (("src_lang", self.source_lang), ("tgt_lang", self.target_lang)):
            if value is not None:
                setattr(tokenizer, attribute, value)
        return tokenizer

    def pairs(self, table: datasets.Dataset) -> Sequence[tuple[str, str]]:
        return list(cells_of(table, self.source_column, self.target_column))

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        lengths = (self.max_length, self.max_target_length)
        options = {"tokenizer": self.tokenizer, "columns": self.columns(split), "prefix": self.prefix}
        encoded = self.encode_by(encode_pairs, table, split, max_lengths=lengths, **options)
        return self.with_references(encoded, table, split)

    @staticmethod
    def collate_rows(rows: list[dict[str, Any]], **padding: Any) -> dict[str, Any]:
        """Pad sources on the tokenizer's side, and targets on the right: a decoder starts with the first token."""
        sources = [{name: values for name, values in row.items() if name != "labels"} for row in rows]
        targets = [{"labels": row["labels"]} for row in rows if "labels" in row]
        return pad_batch(sources, **padding) | (pad_batch(targets, pad_token_id=IGNORED) if targets else {})


def encode_pairs(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    prefix: str,
    max_lengths: tuple[int, int],
) -> dict[str, Any]:
    """Token ids of sources and of targets, where there are any, and which of them were cut."""
    source, *target = columns
    sources, cut = tokenize_cut(tokenizer, max_lengths[0], text=[f"{prefix}{text}" for text in rows[source]])
    ids = sources["input_ids"]
    encoded: dict[str, Any] = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "source_cut": cut}
    if target:
        targets, encoded["target_cut"] = tokenize_cut(tokenizer, max_lengths[1], text_target=rows[target[0]])
        encoded["labels"] = targets["input_ids"]
    return encoded


class PromptCompletionData(TargetData):
    """Files or a Hugging Face set to batches of prompts with their completions; the loss is on the completions alone.

    A completion ends with the tokenizer's end token, which is trained on too. Prompt and completion are tokenized
    separately, so that a prompt's tokens do not depend on the completion.

    Args:
        prompt: a template with columns in braces, such as `{meaning_representation} || `. Special tokens may be
            written out. `{{` is a brace.
        completion: a template of the completion. Its column may have a list of equally good texts. Byte-level
            tokenizers such as GPT-2's need a blank before the first word.
        max_length: tokens of prompt and completion at most; first the prompt's beginning is cut, then the completion's
            end.
        texts: arguments of `TextData`.
    """

    def __init__(
        self,
        *texts: Any,
        prompt: str = "{prompt}",
        completion: str = "{completion}",
        max_length: int = 512,
        **table: Any,
    ) -> None:
        super().__init__(*texts, max_length=max_length, **table)
        self.prompt, self.completion = prompt, completion
        self.input_columns, self.target_columns = columns_of("prompt", prompt), columns_of("completion", completion)
        if not self.input_columns:
            raise LoRAError(f"prompt must have a column in braces, such as '{{source}} || ', got {prompt!r}")
        if len(self.target_columns) != 1:
            raise LoRAError(f"completion must have one column in braces, such as ' {{target}}', got {completion!r}")

    def check(self, table: datasets.Dataset, split: str) -> None:
        is_right = lambda value: isinstance(value, str | int | float)  # noqa: E731
        self.check_cells(table, split, self.input_columns, "text or a number", is_right)

    def pairs(self, table: datasets.Dataset) -> Sequence[tuple[str, str]]:
        rows = {name: list(values_of(table, name)) for name in self.columns("train") if name}
        completions = [text.strip() for text in fill_template(self.completion, rows)]
        return list(zip(fill_template(self.prompt, rows), completions, strict=True))

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        if self.tokenizer.eos_token_id is None:
            raise LoRAError(f"the tokenizer '{self.tokenizer_name}' has no end token (eos_token) to end completions by")
        templates = (self.prompt, None if kind_of(split) == "predict" else self.completion)
        options = {"tokenizer": self.tokenizer, "max_length": self.max_length, "with_prompts": split != "train"}
        encoded = self.encode_by(encode_prompts, table, split, templates=templates, **options)
        for row, length in zip(values_of(table, ROW), values_of(encoded, "prompt_length"), strict=True):
            if not length:
                columns = ", ".join(map(str, self.input_columns))
                raise self.bad_cell(split, row, columns, "a prompt of at least one token", "")
        return self.with_references(encoded.remove_columns("prompt_length"), table, split)


def columns_of(what: str, template: str) -> list[str]:
    """The names of columns in a template, each once; no template, and more than a name in braces, are refused."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise LoRAError(
            f"{what} is no template: {error}, in {template!r}; a brace of its own is written twice"
        ) from error
    for _, column, form, conversion in parts:
        if column is not None and (not column or form or conversion or set(column) & set(".[")):
            raise LoRAError(f"{what}: braces must hold a column's name and nothing else, got {template!r}")
    return list(dict.fromkeys(column for _, column, _, _ in parts if column))


def fill_template(template: str, rows: Mapping[str, list[Any]]) -> list[str]:
    """The template with each row's values in its braces."""
    columns = columns_of("template", template)
    values = zip(*(rows[column] for column in columns), strict=True)
    return [template.format(**dict(zip(columns, cells, strict=True))) for cells in values]


def encode_prompts(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    templates: tuple[str, str | None],
    max_length: int,
    with_prompts: bool,
) -> dict[str, Any]:
    """Token ids of prompt, completion and end, with labels on the latter two; and the prompts alone where wanted."""
    prompts: list[list[int]] = tokenizer(fill_template(templates[0], rows), verbose=False)["input_ids"]  # type: ignore[assignment]
    encoded: dict[str, Any] = {"prompt_length": [len(ids) for ids in prompts]}
    encoded["prompt_cut"] = [len(ids) > max_length for ids in prompts]
    if with_prompts:
        encoded[f"{PROMPT}input_ids"] = [ids[-max_length:] for ids in prompts]
    if templates[1] is not None:
        texts = fill_template(templates[1], rows)
        plain: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[assignment]
        ended = [[*ids, int(tokenizer.eos_token_id)] for ids in plain]  # type: ignore[arg-type]
        completions = [ids[: max_length - 1] for ids in ended]
        encoded["completion_cut"] = [len(ids) >= max_length for ids in ended]
        encoded["prompt_cut"] = [len(ids) + len(o) > max_length for ids, o in zip(prompts, completions, strict=True)]
        pairs = [(ids[-(max_length - len(o)) :], o) for ids, o in zip(prompts, completions, strict=True)]
        encoded["input_ids"] = [[*prompt, *completion] for prompt, completion in pairs]
        encoded["labels"] = [[*([IGNORED] * len(prompt)), *completion] for prompt, completion in pairs]
    return encoded
