"""Encodes conversations by the model's chat template to token ids, and labels of the tokens that are trained on.

An answer is what the model would have to write: from the end of its generation prompt to the token that ends its turn.
Both ends are found by rendering: the conversation up to the answer with a generation prompt, and the one with the
answer, are prefixes of the whole. Templates that rewrite earlier turns (Qwen3 leaves out their thinking, Mistral moves
the system message to the last turn) break that; there a marker in the answer's place shows the text before and after.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.chat.conversations import BadRow, Message, conversation_of, last_answer, tools_of
from lora_lightning.data.io.tables import ROW
from lora_lightning.data.seq2seq import REFERENCES
from lora_lightning.lora.errors import LoRAError, first_line
from lora_lightning.tasks.generation import PROMPT
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED

TrainOn = Literal["answers", "last_answer", "all"]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""A template's own mark of answers."""


MARKER = "\ue000answer\ue000"
"""Characters of the private use area, which are in no template and in no answer."""


class TemplateError(Exception):
    """The chat template refuses a conversation, or rewrites an answer so that it cannot be found."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with its options, as plain data that `datasets` can hash."""

    tokenizer: PreTrainedTokenizerBase
    """A fast one, with a chat template."""
    options: dict[str, Any] = field(default_factory=dict)
    """Variables that the template reads, such as `enable_thinking`."""

    def apply(self, messages: Sequence[Message], tools: Any, **how: Any) -> Any:
        """transformers' `apply_chat_template` with the options; a TemplateError where the template refuses."""
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=tools, **how, **self.options)
        except Exception as error:  # a template may raise anything
            raise TemplateError(f"a conversation that the chat template takes ({first_line(error)})") from error

    def text(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """The conversation's text; `prompt` adds the beginning of an answer."""
        return str(self.apply(messages, tools, tokenize=False, add_generation_prompt=prompt))

    def prompt_ids(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Token ids of a conversation, up to the beginning of an answer."""
        text = self.text(messages, tools, prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, messages: Sequence[Message], tools: Any, train_on: TrainOn) -> tuple[list[int], list[int]]:
        """Token ids up to the last answer's end, and labels: the ids where trained on, else -100."""
        text, last = self.text(messages, tools), train_on == "last_answer"
        encoded: Any
        if train_on != "all" and GENERATION.search(self.tokenizer.get_chat_template(tools=tools)):
            encoded = self.apply(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
            marks = encoded["assistant_masks"]
        else:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            answers = [] if train_on == "all" else answers[-1:] if last else answers
            trained = bytearray(len(text) + 1)  # by characters; a token that begins in the prompt belongs to it
            for start, end in (self._span(messages, tools, text, number) for number in answers):
                trained[start:end] = b"\1" * (end - start)
            marks = [trained[begins] for begins, _ in encoded["offset_mapping"]]
        ids = list(encoded["input_ids"])
        if train_on == "all":
            return ids, ids
        labels = [IGNORED] * len(ids)
        for start, end in runs(marks)[-1 if last else None :]:
            stop = self._turns_end(ids, start, end)
            labels[start:stop] = ids[start:stop]
        return ids, labels

    def _span(self, messages: Sequence[Message], tools: Any, text: str, number: int) -> tuple[int, int]:
        """An answer's first character in the conversation's text, and the one after its turn."""
        before = self._part(messages[:number], tools, prompt=True)
        through = text if number + 1 == len(messages) else self._part(messages[: number + 1], tools)
        start = len(before) if before and text.startswith(before) else None
        if start is not None and text.startswith(through) and len(through) > start:
            return start, len(through)
        # By the text around a marker in its place, in the whole conversation and in one that ends there.
        marked = [*messages[:number], {**messages[number], "content": MARKER}, *messages[number + 1 :]]
        head, found, tail = self._part(marked, tools).partition(MARKER)
        alone, _, closing = self._part(marked[: number + 1], tools).partition(MARKER)
        if start is None and text.startswith(head):
            # The model writes the text between the generation prompt and the answer, such as a blank.
            lead = alone.removeprefix(before) if before and alone.startswith(before) else ""
            start = len(head.removesuffix(lead))
        end = len(text) - len(tail)
        if start is None or not found or not text.endswith(tail) or start > end:
            raise TemplateError(
                f"its answers to be found in what the chat template makes of it, which rewrites message {number + 1}"
                " (train_on: last_answer may do, or a chat_template with {% generation %})"
            )
        return start, end + len(os.path.commonprefix([closing, tail]))  # noqa: RUF071  (by characters)

    def _part(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        """The text of a part of a conversation; empty where the template refuses it, as where roles must alternate."""
        with contextlib.suppress(TemplateError):
            return self.text(messages, tools, prompt=prompt) if messages else ""
        return ""

    def _turns_end(self, ids: Sequence[int], start: int, end: int) -> int:
        """The end of an answer with the special token that ends its turn, if there is one in it or right after it."""
        special, last = special_ids(self.tokenizer), end - 1
        while last > start and not str(self.tokenizer.decode([ids[last]])).strip():  # such as a line break
            last -= 1
        if ids[last] in special:
            return last + 1
        return end + 1 if end < len(ids) and ids[end] in special else end


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Set the chat template from a text or a file, or keep the tokenizer's; without one, or offsets, it is refused."""
    if template is not None and "{%" not in template and "{{" not in template:
        file = Path(resolve(template))
        if not file.is_file():
            raise LoRAError(f"chat_template: expected a Jinja template or a file of one, got '{template}'")
        template = file.read_text(encoding="utf-8")
    if template is not None:
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise LoRAError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template: give data.chat_template, a Jinja template"
            " or a file of one (that of the model's instruction-tuned sibling fits)"
        )
    if not tokenizer.is_fast:
        raise LoRAError(
            f"{type(tokenizer).__name__} cannot say which characters its tokens stand for: a fast tokenizer"
            " (a directory with tokenizer.json) is needed to tell answers from prompts"
        )


def encode_each(
    rows: Mapping[str, list[Any]],
    *,
    encode: Callable[..., dict[str, Any]],
    template: ChatTemplate,
    layout: dict[str, str],
    system: str | None,
    **options: Any,
) -> dict[str, list[Any]]:
    """Columns of `encode(template, messages, tools, **options)` of each row; one that is refused raises a BadRow."""
    encoded = []
    for values in zip(*rows.values(), strict=True):
        row = dict(zip(rows, values, strict=True))
        try:
            encoded.append(encode(template, conversation_of(row, layout, system), tools_of(row, layout), **options))
        except TemplateError as error:
            part = next(part for part in ("messages", "answer", "prompt") if part in layout)
            raise BadRow(part, str(error), row[layout[part]], row=row[ROW]) from error
    return {name: [columns[name] for columns in encoded] for name in encoded[0]}


def conversation_columns(
    template: ChatTemplate, messages: Sequence[Message], tools: Any, *, train_on: TrainOn, max_length: int
) -> dict[str, Any]:
    """Token ids and labels up to the last answer, cut; how many labels remain (nothing predicts the first token)."""
    end = last_answer(messages)
    ids, labels = template.encode(messages[: 0 if end is None else end + 1], tools, train_on)
    trained, whole = (sum(label != IGNORED for label in labels[1:stop]) for stop in (max_length, None))
    cut = {"input_ids": ids[:max_length], "labels": labels[:max_length]}
    return {**cut, "trained": trained, "answer_cut": trained < whole}


def prompt_columns(
    template: ChatTemplate, messages: Sequence[Message], tools: Any, *, answered: bool
) -> dict[str, list[Any]]:
    """The conversation up to its last answer, the only reference; all of it where it need not be `answered`."""
    end = last_answer(messages) if answered or messages[-1]["role"] == "assistant" else None
    references = [] if end is None else [messages[end]["content"]]
    return {f"{PROMPT}input_ids": template.prompt_ids(messages[:end], tools), REFERENCES: references}


def runs(marks: Sequence[object]) -> list[tuple[int, int]]:
    """Each run of true marks: the position of its first, and the one after its last."""
    spans, at = [], 0
    for mark, group in groupby(map(bool, marks)):
        size = len(list(group))
        spans += [(at, at + size)] if mark else []
        at += size
    return spans


def special_ids(tokenizer: Any) -> set[int]:
    """A tokenizer's control tokens."""
    added = tokenizer.added_tokens_decoder.items()
    return {number for number, token in added if token.special} | set(tokenizer.all_special_ids)
