"""What is compared is all that a model returns, and what differs is seen."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning.export.verification import difference, outputs, tolerance
from lora_lightning.lora.errors import MergeError
from tests.factories import llama

ONE, TWO, THREE = torch.tensor([1.0]), torch.tensor([2.0, -4.0]), torch.tensor([[3.0]])
Pair = namedtuple("Pair", "first second")


@dataclass
class Result:
    logits: Any
    more: Any = None
    counts: list = field(default_factory=lambda: [torch.arange(3)])


class Cache:
    def __init__(self, *tensors):
        self.layers, self.owner, self.again = list(tensors), nn.Linear(2, 2), self


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self):
        return self.value


NESTED = {
    "a tensor": (ONE, [ONE]),
    "a tuple of tuples": ((ONE, ((TWO,), [THREE])), [ONE, TWO, THREE]),
    "a mapping": (OrderedDict(a=ONE, b={"c": TWO}), [ONE, TWO]),
    "a named tuple": (Pair(ONE, TWO), [ONE, TWO]),
    "a dataclass with a cache": (Result(ONE, Cache(TWO, THREE)), [ONE, TWO, THREE]),
    "numbers, names and whole numbers": ((ONE, 3, "x", None, torch.arange(2), torch.float32), [ONE]),
}


@pytest.mark.parametrize("name", NESTED)
def test_every_floating_tensor_is_found_however_nested(name):
    value, wanted = NESTED[name]
    found = outputs(Returns(value), {})
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_keys_and_values_and_hidden_states_of_a_transformer_are_compared():
    found = outputs(llama().eval(), {"input_ids": torch.ones(1, 5).long(), "output_hidden_states": True})
    assert len(found) == 1 + 2 * 2 + 3, "logits, keys and values of two layers, hidden states"


def test_largest_differences_are_over_each_outputs_own_largest_entry():
    found = difference([TWO, 1000 * ONE], [TWO + 0.5, 1000 * ONE + 1], "it")
    assert (found.outputs, found.max_abs_diff, found.max_rel_diff) == (2, 1.0, 0.125)
    assert difference([TWO], [TWO.clone()], "it").max_abs_diff == 0


def test_a_nan_is_a_difference_unless_it_was_there_before():
    nan, inf = float("nan"), float("inf")
    same = torch.tensor([1.0, nan, inf, -inf])
    assert difference([same], [same.clone()], "it").max_rel_diff == 0
    for other in ([nan, nan, inf, -inf], [1.0, nan, -inf, -inf], [1.0, 2.0, inf, -inf], [1.0, nan, 5.0, -inf]):
        found = difference([same, ONE], [torch.tensor(other), ONE], "it")
        assert not found.max_rel_diff <= 1e10


def test_outputs_of_another_shape_or_number_are_refused():
    with pytest.raises(MergeError, match=r"it returns 1 outputs, \(1,\), for \(1,\), \(2,\)"):
        difference([ONE, TWO], [ONE], "it")
    with pytest.raises(MergeError, match="it returns"):
        difference([ONE], [THREE], "it")
    with pytest.raises(MergeError, match="no finite number"):
        difference([ONE * float("nan")], [ONE * float("nan")], "it")
    with pytest.raises(MergeError, match="no finite number"):
        difference([], [], "it")


@pytest.mark.parametrize(
    ("base", "asked", "allowed"),
    [
        (torch.float64, None, 1e-10),
        (torch.float32, None, 1e-5),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, None, 16 * 2**-7),
        (torch.bfloat16, torch.float32, 16 * 2**-7),
        (torch.float32, torch.float16, 16 * 2**-10),
        (torch.float16, None, 16 * 2**-10),
    ],
    ids=str,
)
def test_the_tolerance_follows_the_coarsest_dtype(base, asked, allowed):
    found, rule = tolerance(nn.Linear(2, 2, dtype=base).requires_grad_(False), asked)
    assert found == allowed
    assert rule.startswith("16 units of" if allowed > 1e-4 else "in float")
