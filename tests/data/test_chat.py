"""ChatData: files of conversations to batches, and what it says of bad ones."""

import json

import datasets
import pytest
import torch

from lora_lightning.data.chat.data import ChatData
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.lora.errors import LoRAError
from tests.chats import CHATML, GEMMA, PLAIN, TOOLS, assistant, make_tokenizer, user, write_chats

NO_SPLIT = SplitConfig(validation=0.0, test=0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(CHATML).save_pretrained(folder)
    return str(folder)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def trained(data, split="train"):
    rows = data.encoded_rows(split)["labels"]
    return [data.tokenizer.decode([label for label in row if label != -100]) for row in rows]


def test_a_batch_is_padded_and_its_labels_are_the_answers(tmp_path, tokenizer):
    data = ChatData(str(write_chats(tmp_path / "chats.jsonl")), tokenizer, batch_size=8)
    data.setup()
    assert {split: len(data.encoded_rows(split)) for split in ("train", "validation", "test")} == {
        "train": 96,
        "validation": 12,
        "test": 12,
    }
    for batch in data.train_dataloader():
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
        assert ids.shape == labels.shape == mask.shape
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert (labels[mask == 0] == -100).all()
        assert ((labels != -100).sum(1) > 0).all()
    assert set(trained(data)[0].replace("<|im_end|>", "").split()) <= {"sky", "sea", "sun"}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_files_of_every_kind_give_the_same(kind, tmp_path, tokenizer):
    rows = [{"question": "2 + 2?", "answer": "4"}, {"question": "Why?", "answer": "So."}]
    table, file = datasets.Dataset.from_list(rows), tmp_path / f"rows.{kind}"
    if kind == "json":
        file.write_text(json.dumps(rows))
    else:
        {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}[kind](file)
    data = ChatData(str(file), tokenizer, split=NO_SPLIT)
    data.setup()
    assert trained(data) == ["4<|im_end|>", "So.<|im_end|>"]


def test_tools_and_calls_of_several_shapes_go_through_a_file(tmp_path, tokenizer):
    def row(name, arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {key: {"type": "integer"} for key in arguments}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
        messages = [user("Go."), {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": messages, "tools": [tool]}

    path = tmp_path / "calls.parquet"
    datasets.Dataset.from_list([row("f", {"a": 1}), row("g", {"b": 2})]).to_parquet(path)
    data = ChatData(str(path), tokenizer, split=NO_SPLIT, chat_template=TOOLS)
    data.setup()
    assert '{"name": "g", "arguments": {"b": 2}}' in trained(data)[1]
    text = data.tokenizer.decode(data.encoded_rows("train")["input_ids"][0])
    assert '"name": "f"' in text
    assert "null" not in text


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"messages": []}, r"expected at least one message, got \[\]"),
        ({"messages": "Hi."}, "expected a list of messages"),
        ({"messages": [user("Hi."), {"role": "asistant", "content": "x"}]}, "'asistant'; did you mean 'assistant'"),
        ({"messages": [user(None), assistant("x")]}, "content of message 1 to be text, got None"),
        ({"messages": [user("Hi.")]}, r"expected a message of the role assistant, got \['user'\]"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_column(bad, said, tmp_path, tokenizer):
    good = {"messages": [user("Hi."), assistant("Yes.")]}
    path = write(tmp_path / "chats.jsonl", [good, good, bad])
    with pytest.raises(LoRAError, match=rf"chats.jsonl, the train set, row 3, column 'messages': .*{said}"):
        ChatData(path, tokenizer, split=NO_SPLIT).setup()


def test_a_pairs_bad_value_is_named_by_its_own_column(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}])
    with pytest.raises(
        LoRAError, match=r"pairs.jsonl, the train set, row 2, column 'completion': expected text, got None"
    ):
        ChatData(path, tokenizer, split=NO_SPLIT).setup()


def test_a_column_that_is_not_there_is_named(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.jsonl", [{"ask": "a", "reply": "b"}])
    with pytest.raises(LoRAError, match=r"no column 'repli'; did you mean 'reply'"):
        ChatData(path, tokenizer, columns={"prompt": "ask", "answer": "repli"}, split=NO_SPLIT).setup()


def test_a_row_that_the_template_refuses_is_named(tmp_path, tokenizer):
    rows = [[user("Hi."), assistant("Yes.")], [user("Hi."), user("Hi."), assistant("Yes.")]]
    path = write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in rows])
    with pytest.raises(
        LoRAError, match=r"row 2, column 'messages': expected a conversation that the chat template takes"
    ):
        ChatData(path, tokenizer, split=NO_SPLIT, chat_template=GEMMA).setup()


def test_conversations_cut_before_their_answer_are_left_out_aloud(tmp_path, tokenizer):
    rows = [[user("Hi."), assistant("Yes.")], [user("Hi. " * 40), assistant("Yes.")]]
    path = write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in rows])
    data = ChatData(path, tokenizer, split=NO_SPLIT, max_length=60)
    with pytest.warns(
        UserWarning, match=r"1 of 2 conversations have nothing to train on, the first in row 2; 1 of them"
    ):
        data.setup()
    assert trained(data) == ["Yes.<|im_end|>"]
    with pytest.raises(LoRAError, match=r"2 of 2 conversations have nothing .*raise max_length"):
        ChatData(path, tokenizer, split=NO_SPLIT, max_length=4).setup()


def test_a_tokenizer_without_a_template_is_refused_and_given_one(tmp_path):
    make_tokenizer(None).save_pretrained(tmp_path / "bare")
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(LoRAError, match=r"bare' has no chat template: give data.chat_template"):
        ChatData(path, str(tmp_path / "bare"), split=NO_SPLIT).setup()
    with pytest.raises(LoRAError, match=r"expected a Jinja template or a file of one, got 'chat.jinja'"):
        ChatData(path, str(tmp_path / "bare"), split=NO_SPLIT, chat_template="chat.jinja").setup()
    (tmp_path / "own.jinja").write_text(CHATML)
    for template in (CHATML, str(tmp_path / "own.jinja")):
        data = ChatData(path, str(tmp_path / "bare"), split=NO_SPLIT, chat_template=template)
        data.setup()
        assert trained(data) == ["b<|im_end|>"]
        assert data.tokenizer.chat_template == CHATML


def test_a_template_that_closes_no_answer_is_said_to(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.warns(UserWarning, match=r"will not learn to"):
        ChatData(path, tokenizer, split=NO_SPLIT, chat_template=PLAIN).setup()


def test_prompts_are_held_out_conversations_up_to_their_last_answer(tmp_path, tokenizer):
    rows = [[user(f"{i}?"), assistant("Yes."), user("And?"), assistant(f"No {i}.")] for i in range(20)]
    path = write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in rows])
    data = ChatData(path, tokenizer, split=SplitConfig(validation=0.2, test=0.0), system="Be brief.")
    prompts = data.prompts(2)
    held_out = [messages[0]["content"] for messages in data.tables["validation"]["messages"]]
    assert [prompt.text.split("\n")[0] for prompt in prompts] == [f"user: {held_out[0]}", f"user: {held_out[2]}"]
    assert prompts[0].reference == f"No {held_out[0].removesuffix('?')}."
    text = data.tokenizer.decode(prompts[0].input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")


def test_with_prompts_evaluation_has_them_and_predict_needs_no_answers(tmp_path, tokenizer):
    asked = [{"messages": [user("Hi."), assistant("Yes."), user(f"{'And? ' * i}")]} for i in (1, 3)]
    answered = {"messages": [*asked[0]["messages"], assistant("No.")]}
    files = {
        "train": [answered] * 4,
        "test": [answered, *[{"messages": [user("Hi."), assistant("Yes.")]}]],
        "predict": asked,
    }
    files = {split: write(tmp_path / f"{split}.jsonl", rows) for split, rows in files.items()}
    data = ChatData(files, tokenizer, split=NO_SPLIT, with_prompts=True, packing=True)
    data.setup()
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
    assert "Yes.<|im_end|>\n<|im_start|>user\nAnd? And? And? <|im_end|>" in data.tokenizer.decode(
        batch["prompt_input_ids"][1]
    )
    alone = files | {"predict": write(tmp_path / "alone.jsonl", [{"messages": [user("Hi.")]}])}
    ChatData(alone, tokenizer, split=NO_SPLIT, with_prompts=True).setup()
    with pytest.raises(
        LoRAError, match=r"alone.jsonl, the predict set, row 1, .* expected a message of the role assist"
    ):
        ChatData(alone, tokenizer, split=NO_SPLIT).setup()
