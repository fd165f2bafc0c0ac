"""Tokenizers for all tests of data, by name."""

from types import SimpleNamespace

import pytest

from tests import chats, tiny_lm, tiny_pairs, tiny_text
from tests.tiny import make_bert


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Folders: BERT's, one of words for causal models, one of pairs with a chat template, T5's, GPT-2's, ChatML's."""
    folder = tmp_path_factory.mktemp("tokenizers")
    make_bert(folder / "bert")
    tiny_lm.make_tokenizer().save_pretrained(folder / "lm")
    tiny_pairs.make_tokenizer(folder / "pairs")
    tiny_text.make_tokenizer(folder / "t5", ends=True)
    tiny_text.make_tokenizer(folder / "gpt2", ends=False)
    chats.make_tokenizer(chats.CHATML).save_pretrained(folder / "chat")
    return SimpleNamespace(**{name: str(folder / name) for name in ("bert", "lm", "pairs", "t5", "gpt2", "chat")})


@pytest.fixture(scope="session")
def bert(tokenizers):
    return tokenizers.bert
