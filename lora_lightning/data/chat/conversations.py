"""Converts rows of usual layouts (OpenAI, ShareGPT, Alpaca, prompt and answer) to conversations in OpenAI's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lightning.lora.errors import LoRAError, did_you_mean

Message = dict[str, Any]

PARTS = ("messages", "tools", "system", "prompt", "context", "answer")
"""The parts of a conversation that a column can have."""

LAYOUTS: tuple[dict[str, str], ...] = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"messages": "conversation"},
    {"prompt": "instruction", "context": "input", "answer": "output"},
    {"prompt": "instruction", "context": "context", "answer": "response"},
    {"prompt": "instruction", "answer": "output"},
    {"prompt": "instruction", "answer": "response"},
    {"prompt": "prompt", "answer": "completion"},
    {"prompt": "prompt", "answer": "response"},
    {"prompt": "question", "answer": "answer"},
)
"""Known names of columns, of which the first match counts: OpenAI, ShareGPT, Alpaca, Dolly, TRL, question sets."""

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""Names of roles in sets like ShareGPT."""


@dataclass(eq=False)
class BadRow(Exception):
    """A wrong value in a row."""

    part: str
    """Of `PARTS`, that with the value."""
    expected: str
    got: object
    hint: str = ""
    row: int = 0
    """The row's number in its file, where known."""


def layout_of(names: Sequence[str], given: Mapping[str, str] | None, *, answers: bool = True) -> dict[str, str]:
    """The column of each part: the user's, `given`, else of known names; without `answers` rows need have none."""

    def used(layout: Mapping[str, str]) -> dict[str, str]:
        return {part: name for part, name in layout.items() if answers or part != "answer" or name in names}

    if given:
        return used(given)
    for layout in map(used, LAYOUTS):
        if set(layout.values()) <= set(names):
            return {**layout, **{part: part for part in ("tools", "system") if part in names}}
    raise LoRAError(
        f"no column of a conversation is known among {', '.join(names)}: expected messages, conversations,"
        " instruction and output, prompt and completion, or question and answer; name yours in data.columns, such as"
        " {prompt: request, answer: reply} or {messages: dialogue}"
    )


def check_chat_columns(given: Mapping[str, str] | None) -> dict[str, str] | None:
    """The user's `columns`, checked: each is of a known part, and they make a conversation."""
    if given is None:
        return None
    for part in given:
        if part not in PARTS:
            raise LoRAError(f"data.columns: expected {', '.join(PARTS)}, got '{part}'{did_you_mean(part, PARTS)}")
    if given.keys() & {"messages", "prompt", "answer"} not in ({"messages"}, {"prompt", "answer"}):
        raise LoRAError(
            f"data.columns: expected either messages or prompt and answer, got {', '.join(given) or 'none'}"
        )
    return dict(given)


def conversation_of(row: Mapping[str, Any], layout: Mapping[str, str], system: str | None = None) -> list[Message]:
    """The messages of a row, a BadRow where a value is wrong; without an answer they end with the prompt.

    `layout` has the column of each part, `system` is a system message for conversations without one.
    """
    cells = {part: row.get(column) for part, column in layout.items()}
    for part, cell in cells.items():
        optional = cell is None and part in ("context", "system")
        if part not in ("messages", "tools") and not isinstance(cell, str) and not optional:
            raise BadRow(part, "text", cell)
    if "messages" in layout:
        sources = cells["messages"]
        if not isinstance(sources, list) or not sources:
            expected = "at least one message" if sources == [] else "a list of messages, each with role and content"
            raise BadRow("messages", expected, sources)
        messages = [_message(source, number) for number, source in enumerate(sources, 1)]
    else:
        context = str(cells.get("context") or "")
        prompt = f"{cells['prompt']}\n\n{context}" if context.strip() else str(cells["prompt"])
        if not prompt.strip():
            raise BadRow("prompt", "a text that is not empty", cells["prompt"])
        messages = [{"role": "user", "content": prompt}]
        messages += [{"role": "assistant", "content": cells["answer"]}] if "answer" in layout else []
    if messages[0]["role"] not in ("system", "developer") and (own := cells.get("system") or system):
        messages.insert(0, {"role": "system", "content": own})
    return messages


def tools_of(row: Mapping[str, Any], layout: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call: a list of JSON schemas, or that list as JSON text; None for none."""
    cell = row.get(layout["tools"]) if "tools" in layout else None
    if cell is None or cell in ("", []):
        return None
    tools = _json(cell) if isinstance(cell, str) else cell
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools", "a list of tools, each a JSON schema", cell)
    return [without_nulls(tool) for tool in tools] or None


def without_nulls(value: Any) -> Any:
    """The value without keys that are None: a table gives each row the keys of all rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def last_answer(messages: Sequence[Message]) -> int | None:
    """The index of the last answer; None where there is none."""
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)


def _message(source: Any, number: int) -> Message:
    """A message in OpenAI's layout, without empty keys."""
    if not isinstance(source, Mapping):
        raise BadRow("messages", f"message {number} to be a mapping with role and content", source)
    if source.get("role") is None and source.get("from") is not None:
        source = _of_sharegpt(source, number)
    role, content, calls = source.get("role"), source.get("content"), source.get("tool_calls") or []
    if isinstance(role, str):
        role = OTHER_NAMES.get(role, role)
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise BadRow("messages", f"the role of message {number} to be one of {', '.join(ROLES)}", role, hint)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow("messages", f"tool_calls of message {number} to be a list of calls", calls)
    if content is None and calls:
        content = ""
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        content = "".join(str(part.get("text") or "") for part in parts)
    if not isinstance(content, str):
        raise BadRow("messages", f"the content of message {number} to be text", content)
    others = {key: value for key, value in source.items() if value is not None and key != "tool_calls"}
    message = {**others, "role": role, "content": content}
    return {**message, "tool_calls": [_call(call) for call in calls]} if calls else message


def _call(source: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are a mapping, as templates expect them; OpenAI sends them as JSON text."""
    call = without_nulls(source)
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        arguments = _json(function["arguments"])
        function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
    return call  # type: ignore[no-any-return]


def _of_sharegpt(source: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A ShareGPT message, `from` and `value`, as role and content; a function_call's value is the call as JSON."""
    message = {"role": source["from"], "content": source.get("value")}
    if source["from"] != "function_call":
        return message
    call = _json(source.get("value"))
    if not isinstance(call, dict) or "name" not in call:
        raise BadRow(
            "messages", f"message {number}, a function_call, to be JSON with name and arguments", source["value"]
        )
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None
