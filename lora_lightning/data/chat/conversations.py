"""Rows as people keep them (OpenAI, ShareGPT, Alpaca, prompt and answer) to conversations in the OpenAI layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.lora.errors import LoRAError, did_you_mean

Message = dict[str, Any]

PARTS = ("messages", "tools", "system", "prompt", "context", "answer")
"""What a column can stand for."""

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
"""Columns that are known by their names, the first that fits: OpenAI, ShareGPT, Alpaca, Dolly, TRL, question sets."""

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""How ShareGPT-like sets call the roles."""


class BadRow(Exception):
    """What is wrong with a value of a row.

    Args:
        part: which of `PARTS` it stands in.
    """

    def __init__(self, part: str, expected: str, got: object, hint: str = "") -> None:
        super().__init__(expected)
        self.part, self.expected, self.got, self.hint = part, expected, got, hint


def layout_of(names: Sequence[str], given: Mapping[str, str] | None, *, answers: bool = True) -> dict[str, str]:
    """Which column stands for what, by part.

    Args:
        names: the table's columns.
        given: what the user says; the rest is known by its name or not used.
        answers: whether rows must bring an answer; those of `predict` need none.

    Raises:
        LoRAError: neither given nor known.
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
    """The user's `columns`, if each is of a known part and a conversation can be made of them.

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
    """The messages of a row, checked; an answer that is missing (rows of `predict`) ends them with the prompt.

    Args:
        layout: which column stands for what.
        system: put in front where a conversation has no system message of its own.

    Raises:
        BadRow: a value is not what it should be.
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
    given = row.get(layout["tools"]) if "tools" in layout else None
    if given is None or given in ("", []):
        return None
    tools = _json(given) if isinstance(given, str) else given
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools", "a list of tools, each a JSON schema", given)
    return [without_nulls(tool) for tool in tools] or None


def without_nulls(value: Any) -> Any:
    """Without the keys that are None: a table gives each row the keys of all rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def last_answer(messages: Sequence[Message]) -> int | None:
    """Where the last answer stands; None where there is none."""
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
    asked = [{"role": "user", "content": prompt}]
    return [*asked, {"role": "assistant", "content": cells["answer"]}] if answered else asked


def _messages_of_list(given: Any) -> list[Message]:
    if not isinstance(given, list):
        raise BadRow("messages", "a list of messages, each with role and content", given)
    if not given:
        raise BadRow("messages", "at least one message", given)
    return [_message(message, number) for number, message in enumerate(given, 1)]


def _message(given: Any, number: int) -> Message:
    if not isinstance(given, Mapping):
        raise BadRow("messages", f"message {number} to be a mapping with role and content", given)
    if given.get("role") is None and given.get("from") is not None:
        given = _of_sharegpt(given, number)
    role = given.get("role")
    role = OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise BadRow("messages", f"the role of message {number} to be one of {', '.join(ROLES)}", role, hint)
    calls = given.get("tool_calls") or None
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise BadRow("messages", f"tool_calls of message {number} to be a list of calls", calls)
    message = {key: value for key, value in given.items() if value is not None and key != "tool_calls"}
    message |= {"role": role, "content": _content(given.get("content"), number, optional=calls is not None)}
    return message | ({"tool_calls": [_call(call) for call in calls]} if calls else {})


def _content(given: Any, number: int, *, optional: bool) -> str:
    """A message's text, of one piece or of several."""
    if given is None and optional:
        return ""
    if isinstance(given, list) and given and all(isinstance(p, Mapping) and p.get("type") == "text" for p in given):
        given = "".join(str(part.get("text") or "") for part in given)
    if not isinstance(given, str):
        raise BadRow("messages", f"the content of message {number} to be text", given)
    return given


def _call(given: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are a mapping, as templates expect them; OpenAI sends them as JSON text."""
    call = without_nulls(given)
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        arguments = _json(function["arguments"])
        function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
    return call  # type: ignore[no-any-return]


def _of_sharegpt(given: Mapping[str, Any], number: int) -> dict[str, Any]:
    """`from` and `value` as role and content; a function_call's value is the call as JSON."""
    message = {"role": given["from"], "content": given.get("value")}
    if given["from"] != "function_call":
        return message
    call = _json(given.get("value"))
    if not isinstance(call, dict) or "name" not in call:
        raise BadRow(
            "messages", f"message {number}, a function_call, to be JSON with name and arguments", given["value"]
        )
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None
