from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning.lora.frozen.fingerprint import fingerprint, fingerprint_of_tensors
from tests.factories import llama, sequential


@given(st.data())
def test_one_bit_anywhere_changes_it_and_names_its_tensor(data):
    model = sequential()
    before = fingerprint(model)
    name, tensor = data.draw(st.sampled_from(sorted(model.state_dict().items())))
    at = data.draw(st.integers(0, tensor.numel() * 4 - 1))
    tensor.view(-1).view(torch.uint8)[at] ^= 1 << data.draw(st.integers(0, 7))
    after = fingerprint(model)
    assert after.digest != before.digest
    assert after.differences(before) == [name]


def test_the_digest_is_sha256_over_names_and_tensors_and_these_over_their_pieces(monkeypatch):
    sha = lambda *parts: hashlib.sha256(b"".join(parts))  # noqa: E731
    a, b, none = torch.arange(300.0), torch.tensor(7), torch.zeros(3, 0)
    monkeypatch.setattr("lora_lightning.lora.frozen.fingerprint.CHUNK", 512)
    raw = a.numpy().tobytes()
    pieces = [sha(raw[at : at + 512]).digest() for at in (0, 512, 1024)]
    one = sha(b"torch.float32 (300,)", *pieces).hexdigest()
    two = sha(b"torch.int64 ()", sha(b.numpy().tobytes()).digest()).hexdigest()
    three = sha(b"torch.float32 (3, 0)").hexdigest()
    for first in (a, torch.stack([a, a]).t()[:, 0]):  # in one piece of memory, and strided
        got = fingerprint_of_tensors({"b": b, "a": first, "none": none})
        assert got.digest == sha(f"a={one}\nb={two}\nnone={three}\n".encode()).hexdigest()
        assert got.tensors == {"a": one[:16], "b": two[:16], "none": three[:16]}
        assert list(got.tensors) == ["b", "a", "none"], "in the model's own order"


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_same_after_saving_in_shards_and_of_a_file_that_holds_a_tied_weight_twice(tied, tmp_path):
    model = llama(tie_word_embeddings=tied).to(torch.bfloat16)
    before, names = fingerprint(model), {"lm_head.weight", "model.embed_tokens.weight"}
    assert names <= before.tensors.keys()
    for size in ("2KB", "1GB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        assert fingerprint(type(model).from_pretrained(tmp_path / size, dtype=torch.bfloat16)) == before
    assert len(list((tmp_path / "2KB").glob("*.safetensors"))) > 3
    if tied:
        file = tmp_path / "1GB" / "model.safetensors"
        once = load_file(file)
        assert "lm_head.weight" not in once
        twice = {**once, "lm_head.weight": once["model.embed_tokens.weight"].clone()}
        save_file(twice, file, metadata={"format": "pt"})
        assert fingerprint(type(model).from_pretrained(tmp_path / "1GB", dtype=torch.bfloat16)) == before


def test_buffers_count_where_they_are_saved_and_state_that_is_no_tensor_does_not():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

    def make(**buffers):
        model = Extra(2, 2)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        for name, value in buffers.items():
            model.register_buffer(name, value, persistent=name == "kept")
        return fingerprint(model)

    assert make(left_out=torch.ones(1)) == make()
    assert make().tensors.keys() == {"weight", "bias"}
    assert make(kept=torch.ones(1)) != make(kept=torch.zeros(1)) != make()


def test_the_meta_device_has_none():
    with pytest.raises(ValueError, match="meta"):
        fingerprint_of_tensors({"t": torch.zeros(1, device="meta")})
