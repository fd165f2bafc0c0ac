"""What of a conversation is trained on, by the templates of the field: said here by hand, as text."""

import pytest

from lora_lightning.data.chat.chat_template import ChatTemplate, TemplateError, runs
from tests.chats import CHATML, GEMMA, LLAMA3, MARKED, MISTRAL, PLAIN, QWEN3, TOOLS, assistant, make_tokenizer, user

SYSTEM = {"role": "system", "content": "Be brief."}
TWO = [user("Hi."), assistant("Yes."), user("And?"), assistant("No.")]
PADDED = [user(" Hi.\n"), assistant(" Yes.\n\n"), user("\nAnd? "), assistant("\n No. ")]
ALIKE = [user("Yes."), assistant("Yes."), user("Yes."), assistant("Yes.")]
FIRST_THINKS = [user("Hi."), assistant("<think>\nHm.\n</think>\n\nYes."), user("And?"), assistant("No.")]
BOTH_THINK = [*FIRST_THINKS[:3], assistant("<think>\nSo.\n</think>\n\nNo.")]
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = [user("1 + 1?"), {"role": "assistant", "content": "", "tool_calls": [ADD]}, {"role": "tool", "content": "2"}]
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
GIVEN = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
EMPTY = "<think>\n\n</think>\n\n"
E = "<|im_end|>"


def trained_on(template, messages, train_on="answers", tools=None, **options):
    """The texts that are trained on, one for each stretch of tokens."""
    metaspace = options.pop("metaspace", False)
    template = ChatTemplate(make_tokenizer(template, metaspace=metaspace), options)
    ids, labels = template.encode(messages, tools, train_on)
    # What is marked is a conversation as the template itself tokenises it.
    assert ids == template.tokenizer.apply_chat_template(messages, tools=tools, **options)["input_ids"]
    assert all(label in (number, -100) for number, label in zip(ids, labels, strict=True))
    return [template.tokenizer.decode(ids[first:end]) for first, end in runs([label != -100 for label in labels])]


CASES = {
    # Answers and the ends of their turns are trained on, and nothing else.
    "chatml": (CHATML, TWO, {}, [f"Yes.{E}", f"No.{E}"]),
    "generation": (MARKED, TWO, {}, [f"Yes.{E}", f"No.{E}"]),
    "llama3": (LLAMA3, TWO, {}, ["Yes.<|eot_id|>", "No.<|eot_id|>"]),
    "gemma": (GEMMA, TWO, {}, ["Yes.<end_of_turn>", "No.<end_of_turn>"]),
    "last": (CHATML, TWO, {"train_on": "last_answer"}, [f"No.{E}"]),
    "no end of a turn": (PLAIN, TWO, {}, ["Yes.", "No."]),
    # A system message is moved to the last turn.
    "mistral": (MISTRAL, TWO, {}, ["Yes.</s>", "No.</s>"]),
    "mistral's system": (MISTRAL, [SYSTEM, *TWO], {}, ["Yes.</s>", "No.</s>"]),
    "word marks": (MISTRAL, [SYSTEM, *TWO], {"metaspace": True}, ["Yes.</s>", "No.</s>"]),
    # The thinking of the last turn alone, for earlier turns lose theirs; not what the generation prompt writes.
    "thinking before": (QWEN3, FIRST_THINKS, {}, [f"Yes.{E}", f"{EMPTY}No.{E}"]),
    "thinking": (QWEN3, BOTH_THINK, {}, [f"Yes.{E}", f"<think>\nSo.\n</think>\n\nNo.{E}"]),
    "none": (QWEN3, TWO, {"enable_thinking": False}, [f"Yes.{E}", f"No.{E}"]),
    # Templates that strip; answers that repeat the prompt or each other; several bytes a letter; calls of tools.
    "llama3 strips": (LLAMA3, PADDED, {}, ["Yes.<|eot_id|>", "No.<|eot_id|>"]),
    "gemma strips": (GEMMA, PADDED, {}, ["Yes.<end_of_turn>", "No.<end_of_turn>"]),
    "alike": (CHATML, ALIKE, {}, [f"Yes.{E}"] * 2),
    "alike, thinking": (QWEN3, ALIKE, {}, [f"Yes.{E}", f"{EMPTY}Yes.{E}"]),
    "bytes": (CHATML, [user("größer?"), assistant("größer 🙂!")], {}, [f"größer 🙂!{E}"]),
    "tools": (TOOLS, [*CALLS, assistant("2.")], {"tools": GIVEN}, [CALLED, f"2.{E}"]),
    "all": (CHATML, TWO, {"train_on": "all"}, [ChatTemplate(make_tokenizer(CHATML)).text(TWO).strip()]),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_and_the_ends_of_their_turns_are_trained_on_and_nothing_else(name):
    template, messages, options, expected = CASES[name]
    assert [text.strip() for text in trained_on(template, messages, **options)] == expected


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["rendered", "generation"])
@pytest.mark.parametrize("text", [" a ", "\n\na\n", "a\n\n", "  ", "a <b> \t"])
def test_white_space_around_an_answer_stays_in_it(template, text):
    (found,) = trained_on(template, [user("Hi."), assistant(text)])
    assert found.endswith(E)
    # A token of the prompt's own line break and the answer's first is the prompt's; transformers' mask has it in both.
    assert f"\n{text}{E}".removeprefix("" if template == MARKED else "\n").endswith(found)
    assert len(found) >= len(f"{text.lstrip()}{E}")


def test_a_template_that_writes_an_answer_twice_or_refuses_a_conversation_is_told():
    twice = CHATML + "{% for message in messages %}{{ message['content'] | upper | reverse }}{% endfor %}"
    with pytest.raises(TemplateError, match="rewrites message 2"):
        trained_on(twice, TWO)
    with pytest.raises(TemplateError, match="System role not supported"):
        trained_on(GEMMA, [SYSTEM, *TWO])
