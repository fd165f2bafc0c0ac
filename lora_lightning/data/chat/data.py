"""Conversations for instruction tuning, with loss on the answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import datasets
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.chat.chat_template import (
    ChatTemplate,
    TemplateError,
    TrainOn,
    conversation_columns,
    encode_each,
    prompt_columns,
    runs,
    set_template,
    special_ids,
)
from lora_lightning.data.chat.conversations import (
    BadRow,
    Message,
    check_chat_columns,
    conversation_of,
    last_answer,
    layout_of,
    tools_of,
)
from lora_lightning.data.io.splits import kind_of
from lora_lightning.data.io.tables import ROW, check_names, values_of
from lora_lightning.data.loading.packing import pack_table
from lora_lightning.data.seq2seq import REFERENCES
from lora_lightning.data.text import GivesPrompts, Prompt
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED

FEW = 50
"""Rows that are read to learn how answers end."""


class ChatData(GivesPrompts):
    """Files or a Hugging Face set of conversations to batches of token ids and labels, by the model's chat template.

    A row is a list of `messages` (OpenAI's role, content and tool_calls, or ShareGPT's from and value), or a prompt
    with its answer (Alpaca, Dolly, question and answer). Labels are the token ids of answers, with the token that ends
    the turn, and -100 elsewhere.

    Args:
        columns: the column of each part of a row: `messages`, or `prompt` and `answer` with an optional
            `context`; and `tools` and `system`. By default the usual names.
        train_on: all `answers` of a conversation, the `last_answer` alone, or `all` tokens.
        system: a system message for conversations without one.
        chat_template: a Jinja template or a file of one, in place of the tokenizer's.
        template_options: variables that the template reads, such as `{enable_thinking: false}`.
        max_length: tokens per conversation and row at most; longer conversations are cut at their end.
        packing: put several conversations into one row; they do not attend to each other.
        with_prompts: give batches of evaluation and prediction each conversation up to its last answer too, for
            `TextGeneration` to answer; these are not packed. Rows of `predict` then need no answer, and their prompts
            are not cut.
        batch_size: conversations per batch and process in training.
        texts: arguments of `TextData`.
    """

    def __init__(
        self,
        *texts: Any,
        columns: dict[str, str] | None = None,
        train_on: TrainOn = "answers",
        system: str | None = None,
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        max_length: int = 2048,
        packing: bool = False,
        with_prompts: bool = False,
        batch_size: int = 8,
        **table: Any,
    ) -> None:
        super().__init__(*texts, max_length=max_length, batch_size=batch_size, **table)
        self.given_columns, self.train_on, self.system = check_chat_columns(columns), train_on, system
        self.packing, self.with_prompts = packing, with_prompts
        self.chat_template, self.template_options = chat_template, dict(template_options or {})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use, with the chat template."""
        tokenizer = super().tokenizer
        set_template(tokenizer, self.chat_template)
        return tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The chat template with its options."""
        return ChatTemplate(self.tokenizer, self.template_options)

    def columns(self, split: str) -> Sequence[str | None]:
        given = self.given_columns or {}
        return [column for part, column in given.items() if part != "answer" or not self._only_prompts(split)]

    def text_columns(self, table: datasets.Dataset, split: str) -> tuple[list[str], list[str]]:
        layout = self.layout(table, split)
        parts = (("messages", "prompt", "context"), ("answer",))
        inputs, answers = ([layout[part] for part in group if part in layout] for group in parts)
        return inputs, answers

    def _only_prompts(self, split: str) -> bool:
        return self.with_prompts and kind_of(split) == "predict"

    def layout(self, table: datasets.Dataset, split: str) -> dict[str, str]:
        """The column of each part of a conversation."""
        return layout_of(table.column_names, self.given_columns, answers=not self._only_prompts(split))

    def check(self, table: datasets.Dataset, split: str) -> None:
        """Raise for a row that is no conversation."""
        layout = self.layout(table, split)
        check_names(table.column_names, list(layout.values()), self.place(split))
        for row in table:
            try:
                messages, _ = conversation_of(row, layout), tools_of(row, layout)
                if not self._only_prompts(split) and last_answer(messages) is None:
                    raise BadRow("messages", "a message of the role assistant", [m["role"] for m in messages])
            except BadRow as bad:
                raise self.bad_cell(split, row[ROW], layout[bad.part], bad.expected, bad.got, bad.hint) from None

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        kind = kind_of(split)
        if self.with_prompts and kind != "train":
            prompts = self._encode_each(prompt_columns, table, split, answered=kind != "predict")
            return (
                prompts.remove_columns(REFERENCES) if kind == "predict" else self.conversations(table, split, prompts)
            )
        rows = self.conversations(table, split)
        return pack_table(rows, self.max_length, split) if self.packing and kind != "predict" else rows

    def _encode_each(
        self, encode: Callable[..., Any], table: datasets.Dataset, split: str, **options: Any
    ) -> datasets.Dataset:
        """A function of each conversation, with an error for the first row that the template refuses."""
        layout = self.layout(table, split)
        shared = {"encode": encode, "template": self.template, "layout": layout, "system": self.system}
        try:
            return self.encode_by(encode_each, table, split, **shared, **options)
        except BadRow as bad:
            raise self.bad_cell(split, bad.row, layout[bad.part], bad.expected, bad.got) from None

    def conversations(self, table: datasets.Dataset, split: str, *beside: datasets.Dataset) -> datasets.Dataset:
        """Token ids, labels and columns `beside` of the rows with tokens to train on; a warning counts the others."""
        options = {"train_on": self.train_on, "max_length": self.max_length}
        encoded = self._encode_each(conversation_columns, table, split, **options)
        trained, cut = (list(values_of(encoded, name)) for name in ("trained", "answer_cut"))
        encoded = self.without_cuts(encoded, split).remove_columns("trained")
        kept = [row for row, count in enumerate(trained) if count]
        if len(kept) < len(encoded):
            behind = sum(short for count, short in zip(trained, cut, strict=True) if not count)
            message = (
                f"{self.place(split)}: {len(encoded) - len(kept)} of {len(encoded)} conversations have nothing to train"
                f" on, the first in row {table[ROW][trained.index(0)]}; {behind} of them because their answers begin"
                f" behind max_length, {self.max_length} tokens"
            )
            if not kept:
                raise LoRAError(f"{message}: raise max_length, or see what the chat template makes of them")
            rank_zero_warn(f"{message}. They are left out")
        ends = special_ids(self.tokenizer) if split == "train" and self.train_on != "all" else None
        if ends is not None and ends.isdisjoint(number for row in values_of(encoded, "labels") for number in row):
            rank_zero_warn(
                "no answer ends with a control token: the chat template closes none, and the model will not learn to"
                " stop"
            )
        return datasets.concatenate_datasets([encoded, *beside], axis=1).select(kept)

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return a loader with a row for each conversation, never packed."""
        if not self.packing or self.with_prompts or "predict" in self.tables:
            return super().predict_dataloader()
        self.encoded_rows("test")  # raises where there is none
        return self._loader(self.conversations(self.tables["test"], "test"))

    @property
    def stop_token_ids(self) -> list[int]:
        """Return the tokens that end answers in the first rows, and the tokenizer's end token."""
        train, controls, ends = self.tables["train"], special_ids(self.tokenizer), set()
        layout = self.layout(train, "train")
        for row in train.select(range(min(len(train), FEW))):
            messages = conversation_of(row, layout, self.system)
            with contextlib.suppress(TemplateError):  # answers may not be found where all tokens are trained on
                ids, labels = self.template.encode(messages, tools_of(row, layout), "answers")
                ends |= {ids[end - 1] for _, end in runs([label != IGNORED for label in labels])} & controls
        return sorted({*ends, *super().stop_token_ids})

    def prompt_of(self, row: dict[str, Any]) -> Prompt:
        """A conversation up to its last answer."""
        layout = layout_of(list(row), self.given_columns)
        messages = conversation_of(row, layout, self.system)
        end = last_answer(messages)
        assert end is not None  # see check
        ids = self.template.prompt_ids(messages[:end], tools_of(row, layout))
        return Prompt(text=_question(messages[:end]), input_ids=ids, reference=messages[end]["content"])


def _question(messages: Sequence[Message]) -> str:
    """The prompt's messages as text: one message's text, or several with their roles."""
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in turns)
