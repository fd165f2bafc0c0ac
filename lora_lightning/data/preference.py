"""Prompts with two answers each, one chosen and one rejected."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.chat.conversations import Message, without_nulls
from lora_lightning.data.io.tables import ROW, cells_of, values_of
from lora_lightning.data.text import TextData, pad_batch
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED

ROLES = "messages, a list of {role, content}"


class PreferenceData(TextData):
    """Pairs of answers to batches of token ids in which the chosen answers come first and the rejected after them.

    A row is in one of these forms:

    - texts: a prompt and two answers, tokenized unchanged, with the end of text after each answer; with `as_chat` they
      become the user's turn and the assistant's in the tokenizer's chat template.
    - messages: the prompt's, and those of the answers that follow it.
    - without a prompt column: two whole conversations as messages, which are equal but for the last message.

    Where a pair is too long, the beginning of the prompt is cut first, and the ends of the answers only if that is not
    enough. Both answers follow the same prompt.

    Args:
        prompt_column: the prompt; null where the answers' columns contain it.
        chosen_column: the preferred answer.
        rejected_column: the other answer.
        as_chat: put texts into the tokenizer's chat template.
        max_length: tokens of prompt and answer at most.
        max_prompt_length: tokens of a prompt that are kept where a pair is too long; half of `max_length` by default.
        batch_size: pairs per batch and process in training.
        texts: arguments of `TextData`.
    """

    padding_side = "right"

    def __init__(
        self,
        *texts: Any,
        prompt_column: str | None = "prompt",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        as_chat: bool = False,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        batch_size: int = 8,
        **table: Any,
    ) -> None:
        super().__init__(*texts, max_length=max_length, batch_size=batch_size, **table)
        prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        if not 1 <= prompt_length < max_length:
            raise LoRAError(
                f"max_prompt_length must be from 1 to max_length - 1 = {max_length - 1}, got {prompt_length}"
            )
        self.prompt_column, self.chosen_column, self.rejected_column = prompt_column, chosen_column, rejected_column
        self.as_chat, self.max_prompt_length = as_chat, prompt_length
        self.input_columns = [prompt_column, chosen_column, rejected_column]

    def check(self, table: datasets.Dataset, split: str) -> None:
        """Raise for a row that has neither texts nor messages, or an answer without words."""
        of_messages = any(isinstance(value, list) for value in values_of(table, self.chosen_column))
        if of_messages and self.as_chat:
            raise LoRAError(
                "as_chat is for columns of texts: these hold messages, and are put into the template anyway"
            )
        if not of_messages and self.prompt_column is None:
            raise LoRAError("two texts do not say where their prompt ends: name prompt_column, or give messages")
        answers = (self.chosen_column, self.rejected_column)
        if of_messages:
            least = 2 if self.prompt_column is None else 1
            expected = ROLES if least == 1 else f"two or more {ROLES}"
            self.check_cells(table, split, self.input_columns, expected, partial(_are_messages, least=least))
        else:
            super().check(table, split)
        has_words = lambda value: (value[-1]["content"] if of_messages else value).strip()  # noqa: E731
        self.check_cells(table, split, answers, "an answer with words in it", has_words)
        if of_messages and self.prompt_column is None:
            for row, chosen, rejected in cells_of(table, ROW, *answers):
                if without_nulls(chosen[:-1]) != without_nulls(rejected[:-1]):
                    expected = f"the messages of '{self.chosen_column}' but for the last"
                    raise self.bad_cell(split, row, self.rejected_column, expected, rejected)

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        of_messages = isinstance(table[0][self.chosen_column], list)
        if (of_messages or self.as_chat) and not self.tokenizer.chat_template:
            raise LoRAError(
                f"the tokenizer '{self.tokenizer_name}' has no chat template, which messages are put into: take an"
                " instruction-tuned model's, or columns of texts without as_chat"
            )
        options = {"tokenizer": self.tokenizer, "columns": self.input_columns, "as_chat": self.as_chat}
        lengths = {"max_length": self.max_length, "max_prompt_length": self.max_prompt_length}
        return self.encode_by(encode_pairs, table, split, **options, **lengths)

    def lengths(self, table: datasets.Dataset) -> list[int]:
        """The length of a row's longer text."""
        parts = cells_of(table, "prompt", "chosen", "rejected")
        return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in parts]

    @staticmethod
    def collate_rows(rows: list[dict[str, list[int]]], **padding: Any) -> dict[str, Any]:
        """Rows of n pairs to token ids, attention mask and labels, (2n, t) each, the chosen answers first."""
        pairs = [(row["prompt"], row[which]) for which in ("chosen", "rejected") for row in rows]
        texts = [{"input_ids": first + answer, "labels": [IGNORED] * len(first) + answer} for first, answer in pairs]
        return pad_batch(texts, **padding)


def encode_pairs(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str | None],
    as_chat: bool,
    max_length: int,
    max_prompt_length: int,
) -> dict[str, list[Any]]:
    """Token ids of prompts and of both answers, and in which rows a prompt or an answer was cut."""
    out: dict[str, list[Any]] = {name: [] for name in ("prompt", "chosen", "rejected", "prompt_cut", "answer_cut")}
    cells = (rows[column] if column else repeat(None) for column in columns)
    for prompt, chosen, rejected in zip(*cells, strict=False):
        plain = isinstance(chosen, str) and not as_chat
        if plain:
            prompt_text, answer_texts = prompt, [text + (tokenizer.eos_token or "") for text in (chosen, rejected)]
        else:
            prompt_text, answer_texts = _render(tokenizer, *_as_messages(prompt, chosen, rejected))
        first = _ids(tokenizer, prompt_text, special=plain)  # a template writes special tokens itself
        answers = [_ids(tokenizer, text) for text in answer_texts]
        cut = fit_to_length(first, answers, max_length, max_prompt_length, tokenizer.bos_token_id)
        lost = [len(ids) > len(left) for ids, left in zip([first, *answers], cut, strict=True)]
        for column, value in zip(out, [*cut, lost[0], any(lost[1:])], strict=True):
            out[column].append(value)
    return out


def fit_to_length(
    prompt: list[int], answers: list[list[int]], max_length: int, max_prompt_length: int, first: int | None = None
) -> list[list[int]]:
    """Prompt and answers, cut to fit: first the prompt's beginning (a token `first` stays), then the answers' ends."""
    if len(prompt) + max(map(len, answers)) > max_length and len(prompt) > max_prompt_length:
        keeps_first = prompt[0] == first and max_prompt_length > 1
        prompt = [*prompt[:1], *prompt[1 - max_prompt_length :]] if keeps_first else prompt[-max_prompt_length:]
    return [prompt, *(answer[: max_length - len(prompt)] for answer in answers)]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Token ids; with `special` also the special tokens that begin a text, but not those that end it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer.bos_token_id if special else None
    return [first, *ids] if first is not None and tokenizer("")["input_ids"][:1] == [first] else ids


def _as_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[list[Message], list[Message], list[Message]]:
    if isinstance(chosen, str):
        user = [{"role": "user", "content": prompt}]
        return user, *([{"role": "assistant", "content": text}] for text in (chosen, rejected))  # type: ignore[return-value]
    chosen, rejected = without_nulls(chosen), without_nulls(rejected)
    if prompt is None:
        return chosen[:-1], chosen[-1:], rejected[-1:]
    return without_nulls(prompt), chosen, rejected


def _render(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], *answers: list[Message]
) -> tuple[str, list[str]]:
    """The prompt's text up to the beginning of the assistant's turn, and the text of each answer after it."""

    def text(messages: list[Message], begin: bool = False) -> str:
        out = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin)
        assert isinstance(out, str)
        return out

    prompt_text, begun = text(prompt), text(prompt, begin=True)
    whole = [text([*prompt, *answer]) for answer in answers]
    # Some templates begin the assistant's turn with a text that a finished turn does not have, such as a thought.
    shared = os.path.commonprefix([begun, *whole])  # noqa: RUF071  (by characters, which is right here)
    if not shared.startswith(prompt_text.rstrip()):
        raise LoRAError(f"the chat template writes a prompt in another way once it is answered: {whole[0][:200]!r}")
    return shared, [w[len(shared) :] for w in whole]


def _are_messages(value: Any, least: int) -> bool:
    if not isinstance(value, list) or len(value) < least or not all(isinstance(message, dict) for message in value):
        return False
    return all(isinstance(message.get(key), str) for message in value for key in ("role", "content"))
