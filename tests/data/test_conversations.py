"""Rows of the layouts that sets come in, as conversations; and what is wrong with bad ones."""

import pytest

from lora_lightning.data.chat.conversations import BadRow, check_chat_columns, conversation_of, layout_of, tools_of
from lora_lightning.lora.errors import LoRAError
from tests.chats import assistant, user

MESSAGES = {"messages": "messages"}
PAIR = [user("2 + 2?"), assistant("4")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("2 + 2?"), assistant("4") | {"tool_calls": None}]},
        {"messages": [user([{"type": "text", "text": "2 + 2?"}]), assistant("4")]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"instruction": "2 + 2?", "context": None, "response": "4", "category": "x"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"id": "1", "question": "2 + 2?", "answer": "4"},
    ],
    ids=["openai", "parts", "sharegpt", "alpaca", "dolly", "completion", "question"],
)
def test_layouts_are_known_by_their_columns(row):
    assert conversation_of(row, layout_of(list(row), None)) == PAIR


def test_columns_of_other_names_are_mapped_and_a_system_message_goes_in_front_unless_there_is_one():
    row = {"q": "2 + 2?", "passage": "Sums.", "a": "4"}
    columns = {"prompt": "q", "context": "passage", "answer": "a"}
    assert conversation_of(row, layout_of(list(row), columns)) == [user("2 + 2?\n\nSums."), assistant("4")]
    brief, kind = ({"role": "system", "content": f"Be {how}."} for how in ("brief", "kind"))
    for row, first in (({"messages": PAIR}, brief), ({"messages": [kind, *PAIR]}, kind)):
        assert conversation_of(row, MESSAGES, "Be brief.") == [first, *PAIR]
    row = {"messages": PAIR, "system": "Be kind."}
    assert conversation_of(row, {**MESSAGES, "system": "system"}, "Be brief.") == [kind, *PAIR]


def test_tool_calls_get_their_arguments_as_a_mapping_and_lose_what_the_table_filled_up():
    call = {"id": None, "function": {"name": "f", "arguments": '{"a": 1}'}}
    row = {"messages": [user("Hi."), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    (_, message) = conversation_of(row, MESSAGES)
    assert message["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]
    shared = {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}
    (_, other) = conversation_of({"messages": [user("Hi."), shared]}, MESSAGES)
    assert other["tool_calls"][0]["function"] == message["tool_calls"][0]["function"]


def test_tools_are_a_list_or_that_list_as_text():
    tools = [{"type": "function", "function": {"name": "f", "description": None}}]
    plain = [{"type": "function", "function": {"name": "f"}}]
    assert tools_of({"tools": tools}, {"tools": "tools"}) == plain
    assert tools_of({"tools": '[{"type": "function", "function": {"name": "f"}}]'}, {"tools": "tools"}) == plain
    assert tools_of({"tools": None}, {"tools": "tools"}) is tools_of({}, {}) is None
    with pytest.raises(BadRow):
        tools_of({"tools": "f"}, {"tools": "tools"})


def test_columns_that_make_no_conversation_are_refused():
    with pytest.raises(LoRAError, match="'promt'; did you mean 'prompt'"):
        check_chat_columns({"promt": "q", "answer": "a"})
    for columns in ({"prompt": "q"}, {"messages": "m", "answer": "a"}, {"tools": "t"}, {}):
        with pytest.raises(LoRAError, match="either messages or prompt and answer"):
            check_chat_columns(columns)
    with pytest.raises(LoRAError, match="no column of a conversation is known among text, label"):
        layout_of(["text", "label"], None)
