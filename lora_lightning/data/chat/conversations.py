"""Converts rows of usual layouts (OpenAI, ShareGPT, Alpaca, prompt and answer) to conversations in OpenAI's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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


class BadRow(Exception):
    """A wrong value in a row.

    Args:
        part: of `PARTS`, that with the value.
    """

    def __init__(self, part: str, expected: str, got: object, hint: str = "") -> None:
        super().__init__(expected)
        self.part, self.expected, self.got, self.hint = part, expected, got, hint


def layout_of(names: Sequence[str], given: Mapping[str, str] | None, *, answers: bool = True) -> dict[str, str]:
    """The column of each part.

    Args:
        names: the table's columns.
        given: the user's columns by part; without them the known names are used.
        answers: whether rows must have an answer; those of `predict` need none.

    Raises:
        LoRAError: the columns are neither given nor known.
    """
    if given:
        return {part: name for part, name in given.items() if answers or part != "answer" or name in names}
    for layout in LAYOUTS:
        wanted = {part: name for part, name in layout.items() if answers or part != "answer" or name in names}
        if set(wanted.values()) <= set(names):
            return {**wanted, **{part: part for part in ("tools", "system") if part in names}}
    raise LoRAError(
        f"no column of a conversation is known among {', '.join(names)}: expected messages, conversations,"
        " instruction and output, prompt and completion, or question and answer; name yours in data.columns, such as"
        " {prompt: request, answer: reply} or {messages: dialogue}"
    )


def check_chat_columns(given: Mapping[str, str] | None) -> dict[str, str] | None:
    """The user's `columns`, checked: each is of a known part, and they make a conversation.

    Raises:
        LoRAError: an unknown part; neither messages nor a prompt and an answer.
    """
    if given is None:
        return None
    for part in given:
        if part not in PARTS:
            raise LoRAError(f"data.columns: expected {', '.join(PARTS)}, got '{part}'{did_you_mean(part, PARTS)}")
    if ("messages" in given) == ("prompt" in given or "answer" in given) or (
        "messages" not in given and not {"prompt", "answer"} <= set(given)
    ):
        raise LoRAError(
            f"data.columns: expected either messages or prompt and answer, got {', '.join(given) or 'none'}"
        )
    return dict(given)


def conversation_of(row: Mapping[str, Any], layout: Mapping[str, str], system: str | None = None) -> list[Message]:
    """The messages of a row, checked; without an answer (rows of `predict`) they end with the prompt.

    Args:
        layout: the column of each part.
        system: a system message for conversations without one.

    Raises:
        BadRow: a value is wrong.
    """
    cells = {part: row.get(column) for part, column in layout.items()}
    if "messages" in layout:
        messages = _messages_of_list(cells["messages"])
    else:
        messages = _messages_of_pair(cells, answered="answer" in layout)
    system_cell = cells.get("system")
    if system_cell is not None and not isinstance(system_cell, str):
        raise BadRow("system", "text", system_cell)
    if messages[0]["role"] not in ("system", "developer") and (system_cell or system):
        messages.insert(0, {"role": "system", "content": system_cell or system})
    return messages


def tools_of(row: Mapping[str, Any], layout: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call: a list of JSON schemas, or that list as JSON text; None for none.

    Raises:
        BadRow: it is neither.
    """
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


def _messages_of_pair(cells: Mapping[str, Any], answered: bool) -> list[Message]:
    for part in ("prompt", "answer") if answered else ("prompt",):
        if not isinstance(cells[part], str):
            raise BadRow(part, "text", cells[part])
    context = cells.get("context")
    if context is not None and not isinstance(context, str):
        raise BadRow("context", "text", context)
    prompt = f"{cells['prompt']}\n\n{context}" if context and context.strip() else cells["prompt"]
    if not prompt.strip():
        raise BadRow("prompt", "a text that is not empty", cells["prompt"])
    messages = [{"role": "user", "content": prompt}]
    return [*messages, {"role": "assistant", "content": cells["answer"]}] if answered else messages


def _messages_of_list(messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise BadRow("messages", "a list of messages, each with role and content", messages)
    if not messages:
        raise BadRow("messages", "at least one message", messages)
    return [_message(message, number) for number, message in enumerate(messages, 1)]


def _message(source: Any, number: int) -> Message:
    if not isinstance(source, Mapping):
        raise BadRow("messages", f"message {number} to be a mapping with role and content", source)
    if source.get("role") is None and source.get("from") is not None:
        source = _of_sharegpt(source, number)
    role = source.get("role")
    role = OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise BadRow("messages", f"the role of message {number} to be one of {', '.join(ROLES)}", role, hint)
    calls = source.get("tool_calls") or None
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise BadRow("messages", f"tool_calls of message {number} to be a list of calls", calls)
    message = {key: value for key, value in source.items() if value is not None and key != "tool_calls"}
    message |= {"role": role, "content": _content(source.get("content"), number, optional=calls is not None)}
    return message | ({"tool_calls": [_call(call) for call in calls]} if calls else {})


def _content(content: Any, number: int, *, optional: bool) -> str:
    """A message's text, from one part or several."""
    if content is None and optional:
        return ""
    if (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content)
    ):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise BadRow("messages", f"the content of message {number} to be text", content)
    return content


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
