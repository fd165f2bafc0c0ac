"""The batch of an export without data, and how much of a batch is taken."""

import pytest
import torch

from lora_lightning import LoRAError, SequenceClassification
from lora_lightning.export.probe_batch import MOST_ROWS, first_rows, probe_from
from tests.factories import bert, sequential

TASK = SequenceClassification(2)


@pytest.mark.parametrize("example", [torch.ones(3, 8), (torch.ones(3, 8),), {"input": torch.ones(3, 8)}], ids=type)
def test_an_example_of_ones_own_is_taken(example):
    model = sequential()
    for probe in (
        probe_from(model, TASK, None, example),
        probe_from(with_example(model, example), TASK, None),
    ):
        assert probe.inputs.keys() == {"input"}
        assert torch.equal(probe.inputs["input"], torch.ones(3, 8))


def with_example(model, example):
    model.example_input_array = example
    return model


@pytest.mark.parametrize("make", [sequential, bert])
def test_without_data_and_without_an_example_one_line_says_what_to_give(make):
    with pytest.raises(LoRAError, match=r"no batch .* data section, or the model an example_input_array") as refused:
        probe_from(make(), TASK, None)
    assert type(make()).__name__ in str(refused.value)
    assert "\n" not in str(refused.value)


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
