"""Rows of two answers become batches; what is cut, what counts, and which row is at fault."""

import pytest

from lora_lightning import LoRAError
from lora_lightning.data.preference import PreferenceData, fit_to_length
from tests.data.files import ALL, ready, write
from tests.tiny_pairs import as_messages, make_tokenizer, preferences


@pytest.fixture
def llama(tokenizers):
    return tokenizers.pairs


def data_of(folder, tokenizer, rows, **options):
    path = write(folder / "pairs.jsonl", rows)
    return ready(PreferenceData, path, tokenizer, **{"split": ALL, "length_grouped": False} | options)


def texts(data):
    """Of the first batch, unshuffled: each text, and the part of it that counts."""
    rows = [data.encoded_rows("train")[i] for i in range(4)]
    batch, tokenizer = data.collate(rows), data.tokenizer
    real = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    whole = [tokenizer.decode(ids[mask]) for ids, mask in real]
    counted = [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert ((batch["labels"] == batch["input_ids"]) | (batch["labels"] == -100)).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    return whole, counted


def test_texts_stand_as_they_are_and_answers_end(tmp_path, llama):
    rows = preferences(6)
    whole, counted = texts(data_of(tmp_path, llama, rows))
    answered = [(row["prompt"], row[answer]) for answer in ("chosen", "rejected") for row in rows[:4]]
    assert counted == [f"{answer} </s>" for _, answer in answered]
    assert [text.replace("</s>", "").strip() for text in whole] == [" ".join(texts) for texts in answered]


def test_texts_as_chat_messages_and_whole_conversations_are_one(tmp_path, llama):
    rows = preferences(6)
    as_chat = texts(data_of(tmp_path, llama, rows, as_chat=True))
    messages = [as_messages(row) for row in rows]
    messages[5]["prompt"][0]["name"] = "a key that others have not"
    assert texts(data_of(tmp_path, llama, messages)) == as_chat
    whole = [{c: row["prompt"] + row[c] for c in ("chosen", "rejected")} | {"prompt": "unused"} for row in messages]
    assert texts(data_of(tmp_path, llama, whole, prompt_column=None)) == as_chat
    said = [text.replace("</s>", " </s> ").split() for text in as_chat[0][:4]]
    assert said == [f"<s> user {r['prompt']} </s> assistant {r['chosen']} </s>".split() for r in rows[:4]]
    assert all("user" not in c and "assistant" not in c for c in as_chat[1])


def test_an_answer_that_the_template_begins_otherwise_keeps_what_differs(tmp_path):
    """As templates do that put an empty thought only where the assistant is about to speak."""
    template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant idea ' }}{% endif %}"
    )
    make_tokenizer(tmp_path / "words", template=template)
    whole, counted = texts(data_of(tmp_path, tmp_path / "words", preferences(4), as_chat=True))
    assert all("idea" not in text for text in whole)
    assert counted[0].startswith("it is")


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    template = "{{ messages | length }} {% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    make_tokenizer(tmp_path / "words", template=template)
    with pytest.raises(LoRAError, match="writes a prompt in another way once it is answered"):
        data_of(tmp_path, tmp_path / "words", preferences(4), as_chat=True)


def test_cutting_keeps_answers_and_takes_the_prompts_beginning():
    assert fit_to_length([1, 2, 3, 4], [[5, 6], [7]], 6, 3) == [[1, 2, 3, 4], [5, 6], [7]]
    assert fit_to_length([1, 2, 3, 4], [[5, 6], [7]], 5, 3) == [[2, 3, 4], [5, 6], [7]]
    assert fit_to_length([1, 2, 3, 4], [[5, 6], [7]], 5, 3, first=1) == [[1, 3, 4], [5, 6], [7]]
    assert fit_to_length([1, 2, 3, 4], [[5, 6], [7]], 5, 1, first=1) == [[4], [5, 6], [7]]
    assert fit_to_length([1, 2, 3, 4], [[5, 6, 8, 9], [7]], 5, 2) == [[3, 4], [5, 6, 8], [7]]
    assert fit_to_length([1], [[5, 6, 8, 9], [7]], 4, 2) == [[1], [5, 6, 8], [7]]
