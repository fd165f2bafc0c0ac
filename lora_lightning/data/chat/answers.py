"""Finds the answers in a conversation's text as its chat template renders it, by character and by token.

An answer is what the model would have to write: from the end of its generation prompt to the token that ends its turn.
Both ends are found by rendering: the conversation up to the answer with a generation prompt, and the one with the
answer, are prefixes of the whole. Templates that rewrite earlier turns (Qwen3 leaves out their thinking, Mistral moves
the system message to the last turn) break that; there a marker in the answer's place shows the text before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from lora_lightning.data.chat.conversations import Message

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

    Args:
        render: the chat template; it may raise for a part of a conversation.
        messages: the conversation.
        answers: numbers of messages, from 0.

    Raises:
        AnswerNotFoundError: the template does not write a message exactly once.
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
    return start, end + _common_length(closing, tail)


def _common_length(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


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
