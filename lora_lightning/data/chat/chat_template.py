"""Encodes conversations by the model's chat template to token ids, and labels of the tokens that are trained on.

An answer is what the model would have to write: from the end of its generation prompt to the token that ends its turn.
Both ends are found by rendering: the conversation up to the answer with a generation prompt, and the one with the
answer, are prefixes of the whole. Templates that rewrite earlier turns (Qwen3 leaves out their thinking, Mistral moves
the system message to the last turn) break that; there a marker in the answer's place shows the text before and after.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.chat.conversations import Message, conversation_of, last_answer, tools_of
from lora_lightning.data.seq2seq import REFERENCES
from lora_lightning.lora.errors import LoRAError, first_line
from lora_lightning.tasks.generation import PROMPT
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED

TrainOn = Literal["answers", "last_answer", "all"]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""A template's own mark of answers."""


class TemplateError(Exception):
    """The chat template refuses a conversation."""


def _refusal(error: Exception) -> TemplateError:
    return TemplateError(f"a conversation that the chat template takes ({first_line(error)})")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with its options, as plain data that `datasets` can hash."""

    tokenizer: PreTrainedTokenizerBase
    """A fast one, with a chat template."""
    options: dict[str, Any] = field(default_factory=dict)
    """Variables that the template reads, such as `enable_thinking`."""

    def text(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """The conversation's text; `prompt` adds the beginning of an answer."""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **self.options
            )
        )

    def prompt_ids(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Token ids of a conversation, up to the beginning of an answer; a TemplateError where it is refused."""
        try:
            text = self.text(messages, tools, prompt=True)
        except Exception as error:  # a template may raise anything
            raise _refusal(error) from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, messages: Sequence[Message], tools: Any, train_on: TrainOn) -> tuple[list[int], list[int]]:
        """Token ids up to the last answer's end, and labels: the ids where trained on, else -100.

        Raises:
            TemplateError: the template refuses the conversation, or rewrites an answer so that it cannot be found.
        """
        try:
            ids, marks = self._ids_and_marks(messages, tools, train_on)
        except AnswerNotFoundError as error:
            raise TemplateError(
                f"its answers to be found in what the chat template makes of it, which rewrites message {error.number}"
                " (train_on: last_answer may do, or a chat_template with {% generation %})"
            ) from error
        except Exception as error:  # a template may raise anything
            raise _refusal(error) from error
        return ids, [number if mark else IGNORED for number, mark in zip(ids, marks, strict=True)]

    def _ids_and_marks(
        self, messages: Sequence[Message], tools: Any, train_on: TrainOn
    ) -> tuple[list[int], list[bool]]:
        if train_on == "all":
            ids = self.tokenizer(self.text(messages, tools), add_special_tokens=False)["input_ids"]
            return list(ids), [True] * len(ids)
        encoded: Any
        if GENERATION.search(self.tokenizer.get_chat_template(tools=tools)):
            encoded = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, return_dict=True, return_assistant_tokens_mask=True, **self.options
            )
            marks = [bool(mark) for mark in encoded["assistant_masks"]]
        else:
            answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            answers = answers[-1:] if train_on == "last_answer" else answers
            text, spans = answer_spans(lambda some, prompt: self.text(some, tools, prompt=prompt), messages, answers)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            marks = tokens_within(encoded["offset_mapping"], spans)
        ids = list(encoded["input_ids"])
        blank = lambda number: not str(self.tokenizer.decode([number])).strip()  # noqa: E731
        marks = up_to_turns_end(marks, ids, special_ids(self.tokenizer), blank)
        if train_on == "last_answer":
            first = runs(marks)[-1][0] if any(marks) else 0
            marks = [mark and number >= first for number, mark in enumerate(marks)]
        return ids, marks


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


def encode_conversations(
    rows: Mapping[str, list[Any]],
    *,
    template: ChatTemplate,
    layout: dict[str, str],
    system: str | None,
    train_on: TrainOn,
    max_length: int,
) -> dict[str, list[Any]]:
    """Token ids and labels of a batch of rows, cut to `max_length`.

    `problem` is the error of a row, `trained` the number of tokens to train on after the cut, and `whole` that before.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "problem", "trained", "whole")}
    for messages, tools in conversations_of(rows, layout, system):
        ids, labels, problem, end = list[int](), list[int](), "", last_answer(messages)
        try:
            ids, labels = template.encode(messages[: 0 if end is None else end + 1], tools, train_on)
        except TemplateError as error:
            problem = str(error)
        kept = labels[:max_length]
        values = (ids[:max_length], kept, problem, _count_trained(kept), _count_trained(labels))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def encode_prompts(
    rows: Mapping[str, list[Any]], *, template: ChatTemplate, layout: dict[str, str], system: str | None, answered: bool
) -> dict[str, list[Any]]:
    """Return for each row the conversation up to its last answer, and that answer as the only reference.

    Args:
        answered: False where a conversation may end without an answer; then all of it is the prompt.
    """
    columns: dict[str, list[Any]] = {f"{PROMPT}input_ids": [], REFERENCES: [], "problem": []}
    for messages, tools in conversations_of(rows, layout, system):
        end, ids, problem = last_answer(messages), [], ""
        if not answered and messages[-1]["role"] != "assistant":
            end = None
        try:
            ids = template.prompt_ids(messages[:end], tools)
        except TemplateError as error:
            problem = str(error)
        columns[f"{PROMPT}input_ids"].append(ids)
        columns[REFERENCES].append([] if end is None else [messages[end]["content"]])
        columns["problem"].append(problem)
    return columns


def conversations_of(
    rows: Mapping[str, list[Any]], layout: Mapping[str, str], system: str | None
) -> Iterator[tuple[list[Message], Any]]:
    """The messages and the tools of each row."""
    for values in zip(*rows.values(), strict=True):
        row = dict(zip(rows, values, strict=True))
        yield conversation_of(row, layout, system), tools_of(row, layout)


def _count_trained(labels: Sequence[int]) -> int:
    """Return the number of labels that count, without the first, since nothing predicts the first token."""
    return sum(label != IGNORED for label in labels[1:])


Render = Callable[[Sequence[Message], bool], str]
"""Renders messages, with or without a prompt for the next answer at their end, to text."""

MARKER = "\ue000answer\ue000"
"""Characters of the private use area, which are in no template and in no answer."""


class AnswerNotFoundError(Exception):
    """The template rewrites a message so that it cannot be found. Messages count from 1."""

    def __init__(self, number: int) -> None:
        super().__init__(f"message {number}")
        self.number = number


def answer_spans(
    render: Render, messages: Sequence[Message], answers: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation's text, and for each of the `answers` its first character and the one after its turn.

    A message that the template does not write exactly once raises an AnswerNotFoundError.

    Args:
        render: the chat template; it may raise for a part of a conversation.
        messages: the conversation.
        answers: numbers of messages, from 0.
    """
    text = render(messages, False)
    return text, [_span(render, messages, number, text) for number in answers]


def _span(render: Render, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
    before = _render_or_none(render, messages[:number], True)
    through = text if number + 1 == len(messages) else _render_or_none(render, messages[: number + 1], False)
    start = len(before) if before is not None and text.startswith(before) else None
    if start is not None and through is not None and text.startswith(through) and len(through) > start:
        return start, len(through)
    return _by_marker(render, messages, number, text, before)


def _by_marker(
    render: Render, messages: Sequence[Message], number: int, text: str, before: str | None
) -> tuple[int, int]:
    """Find an answer by the text around a marker in its place, in the whole conversation and in one that ends there."""
    marked = [*messages[:number], {**messages[number], "content": MARKER}, *messages[number + 1 :]]
    head, here, tail = (_render_or_none(render, marked, False) or "").partition(MARKER)
    alone, _, closing = (_render_or_none(render, marked[: number + 1], False) or "").partition(MARKER)
    if before is not None and text.startswith(before):
        start = len(before)
    elif text.startswith(head):
        # The model writes the text between the generation prompt and the answer, such as a blank.
        lead = alone.removeprefix(before) if before and alone.startswith(before) else ""
        start = len(head.removesuffix(lead))
    else:
        raise AnswerNotFoundError(number + 1)
    end = len(text) - len(tail)
    if not here or not text.endswith(tail) or start > end:
        raise AnswerNotFoundError(number + 1)
    return start, end + len(os.path.commonprefix([closing, tail]))  # noqa: RUF071  (by characters)


def _render_or_none(render: Render, messages: Sequence[Message], prompt: bool) -> str | None:
    """Render; None where the template refuses these messages, as some do where roles do not alternate."""
    try:
        return render(messages, prompt) if messages else None
    except Exception:  # a template may raise anything
        return None


def tokens_within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return for each token whether it begins within a span. One that begins in the prompt belongs to the prompt."""
    marks, ahead = [], list(spans)
    for begins, _ in offsets:
        while ahead and begins >= ahead[0][1]:
            ahead.pop(0)
        marks.append(bool(ahead) and ahead[0][0] <= begins)
    return marks


def up_to_turns_end(
    marks: Sequence[bool], ids: Sequence[int], special: set[int], blank: Callable[[int], bool]
) -> list[bool]:
    """Let each answer end with the special token that ends its turn, if there is one in it or right after it.

    Args:
        marks: whether each token belongs to an answer.
        special: control tokens.
        blank: whether a token is only white space, such as the line break after the end of a turn.
    """
    marks = list(marks)
    for first, end in runs(marks):
        last = end - 1
        while last > first and blank(ids[last]):
            last -= 1
        if ids[last] in special:
            marks[last + 1 : end] = [False] * (end - last - 1)
        elif end < len(ids) and ids[end] in special:
            marks[end] = True
    return marks


def runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Return each run of marks: the position of its first, and the one after its last."""
    spans, at = [], 0
    for mark, group in groupby(marks):
        size = len(list(group))
        spans += [(at, at + size)] if mark else []
        at += size
    return spans


def special_ids(tokenizer: Any) -> set[int]:
    """A tokenizer's control tokens."""
    added = tokenizer.added_tokens_decoder.items()
    return {number for number, token in added if token.special} | set(tokenizer.all_special_ids)
