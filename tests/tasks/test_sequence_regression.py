"""The loss and both correlations against their formulas."""

import numpy as np
import pytest
import torch
from torch import nn

from lora_lightning import LoRAError
from lora_lightning.tasks.regression import SequenceRegression


class Says(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return {"logits": self.logits}


def test_loss_and_correlations_over_batches_are_those_of_all_examples():
    predicted, target = torch.randn(11, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    target = target + predicted
    task = SequenceRegression()
    for part in (slice(0, 8), slice(8, 11)):
        out = task.step(Says(predicted[part].unsqueeze(1)), {"x": 0, "labels": target[part]})
        metrics = task.update("val", out)
    figures = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert figures["val/loss"] == pytest.approx(float(((predicted - target) ** 2).mean()), rel=1e-6)
    assert figures["val/pearson"] == pytest.approx(np.corrcoef(predicted, target)[0, 1], rel=1e-5)
    ranks = [np.argsort(np.argsort(values.numpy())) for values in (predicted, target)]
    assert figures["val/spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-5)
    assert (task.monitor, task.monitor_mode) == ("val/pearson", "max")


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_predictions_are_a_number_for_each_example(shape):
    assert SequenceRegression().predict(Says(torch.ones(shape)), {"x": 0})["prediction"].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        (torch.zeros(4, 2), torch.zeros(4), r"must return \(n, 1\).*got \(4, 2\): give its head 1 output"),
        (torch.zeros(4, 1), torch.zeros(4, 1), r"labels must be one number for each example, \(4,\), got \(4, 1\)"),
        (torch.zeros(4, 1), None, "no 'labels'"),
    ],
)
def test_a_misfit_is_named(logits, labels, said):
    batch = {"x": 0} if labels is None else {"x": 0, "labels": labels}
    with pytest.raises(LoRAError, match=said):
        SequenceRegression().step(Says(logits), batch)
