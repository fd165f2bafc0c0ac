"""The batch that an export is proven on, and what is compared over it: all that a model returns."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, SequenceClassification
from lora_lightning.export.probe_batch import MOST_ROWS, first_batch, first_rows, probe_from
from lora_lightning.export.verification import difference, outputs, tolerance
from lora_lightning.lora.errors import MergeError
from tests.factories import sequential
from tests.training.small import Vision

TASK, X = SequenceClassification(2), torch.arange(12.0).view(2, 6)


@pytest.mark.parametrize("example", [torch.ones(3, 8), (torch.ones(3, 8),), {"input": torch.ones(3, 8)}], ids=type)
def test_an_example_of_ones_own_is_taken(example):
    model = sequential()
    given = probe_from(model, TASK, None, example)
    model.example_input_array = example
    for probe in (given, probe_from(model, TASK, None)):
        assert probe.inputs.keys() == {"input"}
        assert torch.equal(probe.inputs["input"], torch.ones(3, 8))
    assert probe_from(model.to("meta"), TASK, None, example).inputs["input"].is_meta, "as on another card"


def test_without_data_and_without_an_example_one_line_says_what_to_give():
    said = "no batch .* Sequential .* data section, or the model an example_input_array"
    with pytest.raises(LoRAError, match=said):
        probe_from(sequential(), TASK, None)


def test_a_batch_of_the_data_is_cut_to_its_first_rows():
    n = MOST_ROWS + 5
    batch = {"x": torch.randn(n, 3), "names": [str(i) for i in range(n)], "scale": 2.0, "labels": torch.zeros(n)}
    inputs = first_rows(batch)
    assert torch.equal(inputs["x"], batch["x"][:MOST_ROWS])
    assert inputs["names"] == batch["names"][:MOST_ROWS]
    assert inputs["scale"] == 2.0
    assert "labels" not in inputs
    ragged = {"x": torch.randn(n, 3), "lengths": torch.tensor([n - 1, 1])}
    assert first_rows(ragged)["x"].shape == (n, 3), "what is not by rows stays whole"


UNNAMED = {
    "a tuple of Tensor, Tensor": (X, torch.tensor([0, 1])),
    "a list of Tensor": [X],
    "a Tensor": X,
    "a dict": {0: X},
}


@pytest.mark.parametrize("said", UNNAMED)
def test_a_batch_that_names_no_arguments_is_one_clear_error_or_the_models_own_example(said, make_module):
    module = make_module(Vision(), LoRAConfig(r=2))
    with pytest.raises(LoRAError, match=rf"first is {said}: let collate_fn return a dict, or give the module an exam"):
        first_batch([iter([UNNAMED[said]])], module)
    module.example_input_array = X
    assert first_batch([iter([UNNAMED[said]])], module) is None
    assert torch.equal(probe_from(module.backbone, module.task, None, module.example_input_array).inputs["x"], X)


ONE, TWO, THREE = torch.tensor([1.0]), torch.tensor([2.0, -4.0]), torch.tensor([[3.0]])


@dataclass
class Result:
    logits: Any
    more: Any = None
    counts: list = field(default_factory=lambda: [torch.arange(3)])


class Cache:
    def __init__(self, *tensors):
        self.layers, self.owner, self.again = list(tensors), nn.Linear(2, 2), self


NESTED = {
    "a tensor": (ONE, [ONE]),
    "a tuple of tuples": ((ONE, ((TWO,), [THREE])), [ONE, TWO, THREE]),
    "a mapping": (OrderedDict(a=ONE, b={"c": TWO}), [ONE, TWO]),
    "a dataclass with a cache": (Result(ONE, Cache(TWO, THREE)), [ONE, TWO, THREE]),
    "numbers, names and whole numbers": ((ONE, 3, "x", None, torch.arange(2), torch.float32), [ONE]),
}


@pytest.mark.parametrize("name", NESTED)
def test_every_floating_tensor_is_found_however_nested(name):
    value, wanted = NESTED[name]
    model = nn.Module()
    model.forward = lambda: value
    found = outputs(model, {})
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


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
    for nothing in ([ONE * float("nan")], []):
        with pytest.raises(MergeError, match="no finite number"):
            difference(nothing, nothing, "it")


F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ALLOWED = [(F64, None, 1e-10), (F32, None, 1e-5), (F32, F16, 16 * 2**-10)]
ALLOWED += [(BF16, None, 16 * 2**-7), (BF16, F32, 16 * 2**-7)]


@pytest.mark.parametrize(("base", "asked", "allowed"), ALLOWED, ids=str)
def test_the_tolerance_follows_the_coarsest_dtype(base, asked, allowed):
    found, rule = tolerance(nn.Linear(2, 2, dtype=base).requires_grad_(False), asked)
    assert found == allowed
    assert rule.startswith("16 units of" if allowed > 1e-4 else "in float")
