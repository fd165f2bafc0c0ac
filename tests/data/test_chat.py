"""ChatData: files of conversations to batches, and what it says of bad ones."""

import datasets
import pytest

from lora_lightning.data.chat.data import ChatData
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.lora.errors import LoRAError
from tests.chats import CHATML, GEMMA, PLAIN, TOOLS, assistant, make_tokenizer, user
from tests.data.files import ALL, ready, write


@pytest.fixture
def chats_of(tokenizers):
    return lambda path, tokenizer=tokenizers.chat, **options: ready(
        ChatData, path, tokenizer, **{"split": ALL} | options
    )


def trained(data):
    rows = data.encoded_rows("train")["labels"]
    return [data.tokenizer.decode([label for label in row if label != -100]) for row in rows]


def test_tools_and_calls_of_several_shapes_go_through_a_file(tmp_path, chats_of):
    def row(name, arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {key: {"type": "integer"} for key in arguments}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
        messages = [user("Go."), {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": messages, "tools": [tool]}

    path = tmp_path / "calls.parquet"
    datasets.Dataset.from_list([row("f", {"a": 1}), row("g", {"b": 2})]).to_parquet(path)
    data = chats_of(path, chat_template=TOOLS)
    assert '{"name": "g", "arguments": {"b": 2}}' in trained(data)[1]
    text = data.tokenizer.decode(data.encoded_rows("train")["input_ids"][0])
    assert '"name": "f"' in text
    assert "null" not in text


def test_a_row_that_the_template_refuses_is_named(tmp_path, chats_of):
    rows = [[user("Hi."), assistant("Yes.")], [user("Hi."), user("Hi."), assistant("Yes.")]]
    path = write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in rows])
    with pytest.raises(LoRAError, match=r"row 2, column 'messages': expected a conversation that the chat template"):
        chats_of(path, chat_template=GEMMA)


def test_conversations_cut_before_their_answer_are_left_out_aloud(tmp_path, chats_of):
    rows = [[user("Hi."), assistant("Yes.")], [user("Hi. " * 40), assistant("Yes.")]]
    path = write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in rows])
    with pytest.warns(UserWarning, match=r"1 of 2 conversations have nothing to train on, the first in row 2; 1 of"):
        data = chats_of(path, max_length=60)
    assert trained(data) == ["Yes.<|im_end|>"]
    with pytest.raises(LoRAError, match=r"2 of 2 conversations have nothing .*raise max_length"):
        chats_of(path, max_length=4)


def test_a_tokenizer_without_a_template_is_refused_and_given_one(tmp_path, chats_of):
    make_tokenizer(None).save_pretrained(tmp_path / "bare")
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(LoRAError, match=r"bare' has no chat template: give data.chat_template"):
        chats_of(path, tmp_path / "bare")
    with pytest.raises(LoRAError, match=r"expected a Jinja template or a file of one, got 'chat.jinja'"):
        chats_of(path, tmp_path / "bare", chat_template="chat.jinja")
    (tmp_path / "own.jinja").write_text(CHATML)
    for template in (CHATML, str(tmp_path / "own.jinja")):
        data = chats_of(path, tmp_path / "bare", chat_template=template)
        assert trained(data) == ["b<|im_end|>"]
        assert data.tokenizer.chat_template == CHATML


def test_a_template_that_closes_no_answer_is_said_to(tmp_path, chats_of):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.warns(UserWarning, match=r"will not learn to"):
        chats_of(path, chat_template=PLAIN)


def test_prompts_are_held_out_conversations_up_to_their_last_answer(tmp_path, chats_of):
    rows = [[user(f"{i}?"), assistant("Yes."), user("And?"), assistant(f"No {i}.")] for i in range(20)]
    path = write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in rows])
    data = chats_of(path, split=SplitConfig(validation=0.2, test=0.0), system="Be brief.")
    prompts = data.prompts(2)
    held_out = [messages[0]["content"] for messages in data.tables["validation"]["messages"]]
    assert [prompt.text.split("\n")[0] for prompt in prompts] == [f"user: {held_out[0]}", f"user: {held_out[2]}"]
    assert prompts[0].reference == f"No {held_out[0].removesuffix('?')}."
    text = data.tokenizer.decode(prompts[0].input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")


def test_with_prompts_evaluation_has_them_and_predict_needs_no_answers(tmp_path, chats_of):
    asked = [{"messages": [user("Hi."), assistant("Yes."), user(f"{'And? ' * i}")]} for i in (1, 3)]
    answered = {"messages": [*asked[0]["messages"], assistant("No.")]}
    short = {"messages": [user("Hi."), assistant("Yes.")]}
    files = {"train": [answered] * 4, "test": [answered, short], "predict": asked}
    files = {split: write(tmp_path / f"{split}.jsonl", rows) for split, rows in files.items()}
    data = chats_of(files, with_prompts=True, packing=True)
    assert set(next(iter(data.train_dataloader()))) == {"input_ids", "labels", "position_ids"}
    (batch,) = data.test_dataloader()
    assert batch["references"] == [["No."], ["Yes."]]
    assert batch["input_ids"].shape == batch["labels"].shape
    prompts = data.tokenizer.batch_decode(batch["prompt_input_ids"])
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    assert prompts[1].startswith("<pad>")
    assert (batch["prompt_attention_mask"] == (batch["prompt_input_ids"] != data.pad_token_id)).all()
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"prompt_input_ids", "prompt_attention_mask"}
    prompt = data.tokenizer.decode(batch["prompt_input_ids"][1])
    assert "Yes.<|im_end|>\n<|im_start|>user\nAnd? And? And? <|im_end|>" in prompt
    alone = files | {"predict": write(tmp_path / "alone.jsonl", [{"messages": [user("Hi.")]}])}
    chats_of(alone, with_prompts=True)
    with pytest.raises(LoRAError, match=r"alone.jsonl, the predict set, row 1, .* expected a message of the role ass"):
        chats_of(alone)
