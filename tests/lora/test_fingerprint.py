from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_lightning import LoRAConfig, inject, merge, remove
from lora_lightning.lora.fingerprint import Fingerprint, fingerprint, of_tensors
from tests.factories import Own, move, sequential


def test_the_fingerprint_is_the_same_with_and_without_adapters(family, dtype):
    model = family.build(dtype)
    before = fingerprint(model)
    inject(model, LoRAConfig(r=2))
    move(model)
    assert fingerprint(model) == before
    merged = fingerprint(merge_copy(model))
    assert merged.digest != before.digest
    assert all(name.endswith("weight") for name in merged.differences(before))
    assert fingerprint(remove(model)) == before == fingerprint(family.build(dtype))


def merge_copy(model):
    import copy

    twin = copy.deepcopy(model)
    merge(twin)
    return twin


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


def test_names_dtypes_and_shapes_count():
    zeros = torch.zeros(2, 6)
    digests = {
        of_tensors({"a": zeros}).digest,
        of_tensors({"b": zeros}).digest,
        of_tensors({"a": zeros.reshape(6, 2)}).digest,
        of_tensors({"a": zeros.to(torch.int32)}).digest,
        of_tensors({"a": -zeros}).digest,
        of_tensors({}).digest,
    }
    assert len(digests) == 6


def test_order_and_memory_layout_do_not_count():
    a, b = torch.randn(3, 4), torch.randn(2)
    assert of_tensors({"a": a, "b": b}) == of_tensors({"b": b, "a": a.t().contiguous().t()})


def test_the_digest_is_sha256_of_sorted_names_and_digests():
    a, b = torch.arange(3.0), torch.tensor(7)
    one = hashlib.sha256(b"torch.float32 (3,)" + a.numpy().tobytes()).hexdigest()
    two = hashlib.sha256(b"torch.int64 ()" + b.numpy().tobytes()).hexdigest()
    got = of_tensors({"b": b, "a": a})
    assert got.digest == hashlib.sha256(f"a={one}\nb={two}\n".encode()).hexdigest()
    assert got.tensors == {"a": one[:16], "b": two[:16]}
    assert got.digest.startswith(got.short)


@pytest.mark.parametrize(
    "tensor",
    [
        *(torch.zeros(0), torch.zeros(3, 0), torch.tensor(1.5), torch.ones(2, dtype=torch.bool)),
        *(torch.ones(3).to(torch.float8_e4m3fn), torch.ones(2, dtype=torch.complex64), torch.ones(4)[::2]),
        nn.Parameter(torch.ones(2)),
    ],
    ids=str,
)
def test_every_kind_of_tensor_has_one(tensor):
    assert of_tensors({"t": tensor}).tensors["t"] == of_tensors({"t": tensor.clone()}).tensors["t"]


def test_a_fingerprint_survives_as_text():
    print_ = fingerprint(sequential())
    assert Fingerprint.from_json(print_.to_json()) == print_


def test_a_head_that_is_trained_in_full_is_no_part_of_w0():
    model, other = Own(), Own()
    other.load_state_dict(model.state_dict())
    nn.init.ones_(other.head.weight)
    model.inner["head"], other.inner["head"] = model.head, other.head  # in two places
    config = LoRAConfig(r=2, target_modules=["first"], modules_to_save=["head"])
    assert fingerprint(model) != fingerprint(other)
    inject(model, config)
    inject(other, config)
    assert fingerprint(model) == fingerprint(other)
    assert not [
        name for name in fingerprint(model).tensors if "head." in name and "_head" not in name and "over" not in name
    ]


def test_state_that_is_no_tensor_is_left_out():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            assert state

    model = nn.Sequential(Extra(4, 4), nn.Linear(4, 2))
    inject(model, LoRAConfig(r=1))
    assert fingerprint(model).tensors.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_the_meta_device_has_none():
    with pytest.raises(ValueError, match="meta"):
        of_tensors({"t": torch.zeros(1, device="meta")})
