"""What of a conversation is trained on, by the templates of the field: said here by hand, as text."""

import pytest

from lora_lightning.data.chat.answers import runs
from lora_lightning.data.chat.chat_template import ChatTemplate, TemplateError
from tests.chats import CHATML, GEMMA, LLAMA3, MARKED, MISTRAL, PLAIN, QWEN3, TOOLS, assistant, make_tokenizer, user

TWO_TURNS = [user("Hi."), assistant("Yes."), user("And?"), assistant("No.")]
SYSTEM = {"role": "system", "content": "Be brief."}


def trained_on(template, messages, train_on="answers", tools=None, **options):
    """The texts that are trained on, one for each stretch of tokens."""
    metaspace = options.pop("metaspace", False)
    template = ChatTemplate(make_tokenizer(template, metaspace=metaspace), options)
    ids, labels = template.encode(messages, tools, train_on)
    # What is marked is a conversation as the template itself tokenises it.
    assert ids == template.tokenizer.apply_chat_template(messages, tools=tools, **options)["input_ids"]
    assert all(label in (number, -100) for number, label in zip(ids, labels, strict=True))
    stretches = runs([label != -100 for label in labels])
    return [template.tokenizer.decode(ids[first:end]) for first, end in stretches]


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>")],
    ids=["chatml", "generation", "llama3", "gemma"],
)
def test_answers_and_the_ends_of_their_turns_are_trained_on_and_nothing_else(template, end):
    assert trained_on(template, TWO_TURNS) == [f"Yes.{end}", f"No.{end}"]
    assert trained_on(template, TWO_TURNS, "last_answer") == [f"No.{end}"]


@pytest.mark.parametrize("metaspace", [False, True], ids=["bytes", "metaspace"])
def test_mistral_moves_its_system_message_and_the_answers_are_still_found(metaspace):
    found = trained_on(MISTRAL, [SYSTEM, *TWO_TURNS], metaspace=metaspace)
    assert [text.strip() for text in found] == ["Yes.</s>", "No.</s>"]
    assert [text.strip() for text in trained_on(MISTRAL, TWO_TURNS, metaspace=metaspace)] == ["Yes.</s>", "No.</s>"]


def test_qwen3_trains_the_thinking_of_the_last_turn_alone_for_earlier_turns_lose_theirs():
    messages = [user("Hi."), assistant("<think>\nHm.\n</think>\n\nYes."), user("And?"), assistant("No.")]
    assert trained_on(QWEN3, messages) == ["Yes.<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>"]
    messages[-1] = assistant("<think>\nSo.\n</think>\n\nNo.")
    assert trained_on(QWEN3, messages) == ["Yes.<|im_end|>", "<think>\nSo.\n</think>\n\nNo.<|im_end|>"]


def test_what_the_generation_prompt_writes_is_not_trained_on():
    assert trained_on(QWEN3, TWO_TURNS, enable_thinking=False) == ["Yes.<|im_end|>", "No.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["rendered", "generation"])
@pytest.mark.parametrize("text", [" a ", "\n\na\n", "a\n\n", "  ", "a <b> \t"])
def test_white_space_around_an_answer_stays_in_it(template, text):
    (found,) = trained_on(template, [user("Hi."), assistant(text)])
    assert found.endswith("<|im_end|>")
    # A token of the prompt's own line break and the answer's first is the prompt's; transformers' mask has it in both.
    assert f"\n{text}<|im_end|>".removeprefix("" if template == MARKED else "\n").endswith(found)
    assert len(found) >= len(f"{text.lstrip()}<|im_end|>")


@pytest.mark.parametrize("template", [LLAMA3, GEMMA], ids=["llama3", "gemma"])
def test_templates_that_strip_have_their_answers_found(template):
    end = "<|eot_id|>" if template == LLAMA3 else "<end_of_turn>"
    messages = [user(" Hi.\n"), assistant(" Yes.\n\n"), user("\nAnd? "), assistant("\n No. ")]
    assert trained_on(template, messages) == [f"Yes.{end}", f"No.{end}"]


def test_tool_calls_are_answers_and_what_tools_say_is_not():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        user("1 + 1?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        assistant("2."),
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    found = trained_on(TOOLS, messages, tools=tools)
    assert found == ['<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>', "2.<|im_end|>"]
    text = ChatTemplate(make_tokenizer(TOOLS)).text(messages, tools)
    assert text.startswith('<|im_start|>system\nTools:\n{"type": "function"')


def test_answers_that_repeat_the_prompt_or_each_other_are_told_apart():
    messages = [user("Yes."), assistant("Yes."), user("Yes."), assistant("Yes.")]
    assert trained_on(QWEN3, messages) == ["Yes.<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"]
    assert trained_on(CHATML, messages) == ["Yes.<|im_end|>"] * 2


def test_an_answer_of_several_bytes_a_letter_is_trained_on_whole():
    assert trained_on(CHATML, [user("größer?"), assistant("größer 🙂!")]) == ["größer 🙂!<|im_end|>"]


def test_a_template_without_an_end_of_turn_trains_the_answer_as_it_stands():
    assert [text.strip() for text in trained_on(PLAIN, TWO_TURNS)] == ["Yes.", "No."]


def test_all_is_all():
    (text,) = trained_on(CHATML, TWO_TURNS, "all")
    assert text == ChatTemplate(make_tokenizer(CHATML)).text(TWO_TURNS)


def test_a_template_that_writes_an_answer_twice_is_refused_by_the_message():
    twice = CHATML + "{% for message in messages %}{{ message['content'] | upper | reverse }}{% endfor %}"
    with pytest.raises(TemplateError, match="rewrites message 2"):
        trained_on(twice, TWO_TURNS)


def test_a_template_that_refuses_a_conversation_says_why():
    with pytest.raises(TemplateError, match="System role not supported"):
        trained_on(GEMMA, [SYSTEM, *TWO_TURNS])
