"""Tokenizers for all tests of data, by name."""

from types import SimpleNamespace

import pytest
from transformers import CLIPImageProcessor, CLIPProcessor

from tests import chats, tiny_lm, tiny_pairs, tiny_text
from tests.tiny import make_bert


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Folders by name: `lm` is of words for causal models, `pairs` has a chat template, `clip` is a processor."""
    folder = tmp_path_factory.mktemp("tokenizers")
    make_bert(folder / "bert")
    tiny_lm.make_tokenizer().save_pretrained(folder / "lm")
    tiny_pairs.make_tokenizer(folder / "pairs")
    tiny_text.make_tokenizer(folder / "t5", ends=True)
    tiny_text.make_tokenizer(folder / "gpt2", ends=False)
    chats.make_tokenizer(chats.CHATML).save_pretrained(folder / "chat")
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPProcessor(images, tiny_pairs.make_tokenizer(folder / "clip")).save_pretrained(folder / "clip")
    return SimpleNamespace(
        **{name: str(folder / name) for name in ("bert", "lm", "pairs", "t5", "gpt2", "chat", "clip")}
    )


@pytest.fixture(scope="session")
def bert(tokenizers):
    return tokenizers.bert
