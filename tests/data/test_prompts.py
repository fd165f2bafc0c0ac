"""What language models are asked, and what they go on from."""

import pytest

from lora_lightning import huggingface
from lora_lightning.data.language_modelling import LanguageModellingData
from lora_lightning.data.text import LONGEST, beginning_of
from lora_lightning.training.callbacks.generation_samples import generate_answers
from tests.chats import make_llama, make_tokenizer
from tests.data.files import ALL, ready, write


def test_a_text_is_asked_by_its_first_half():
    tokenizer = make_tokenizer(None)
    text = "What is it?  Is it so? The colour of the sky is blue."
    prompt = beginning_of(text, tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert prompt.input_ids == ids[: len(ids) // 2]
    assert "".join(tokenizer.decode(ids).split()) == "".join(f"{prompt.text}{prompt.reference}".split())
    assert len(beginning_of("sky " * 500, tokenizer).input_ids) == LONGEST
    assert len(beginning_of("a", tokenizer).input_ids) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_are_gone_on_with(tmp_path, streaming):
    make_llama(tmp_path / "llama", end="</s>")
    files = {}
    for split in ("train", "validation"):
        rows = [{"text": f"{split} {number}: the sky is blue, and the sea is blue as well."} for number in range(20)]
        files[split] = write(tmp_path / f"{split}.jsonl", rows)
    options = {"split": ALL, "max_length": 64, "streaming": streaming}
    data = ready(LanguageModellingData, files, tmp_path / "llama", **options)
    prompts = data.prompts(4)
    first = [prompt.text.split(":")[0] for prompt in prompts]
    assert first == [f"validation {number}" for number in (range(4) if streaming else range(0, 20, 5))]
    backbone = huggingface(str(tmp_path / "llama"), auto_class="AutoModelForCausalLM")
    said = generate_answers(backbone, data, prompts, 6)
    assert len(said) == 4
    assert data.stop_token_ids == [data.tokenizer.eos_token_id]
