"""Loss and metrics against their formulas; units are weighed and batches are not."""

import pytest
import torch
from torch import nn

from lora_lightning import LoRAError, SequenceClassification


class Logits(nn.Module):
    """Returns what it was made with, as a tensor or in one of the shapes that backbones use."""

    def __init__(self, logits, form):
        super().__init__()
        self.logits, self.form = logits, form

    def forward(self, x):
        wrapped = {"tensor": self.logits, "mapping": {"logits": self.logits}, "tuple": (self.logits, None)}
        return wrapped[self.form]


@pytest.mark.parametrize("form", ["tensor", "mapping", "tuple"])
def test_loss_is_the_mean_cross_entropy(form):
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    out = SequenceClassification(3).step(Logits(logits, form), {"x": torch.zeros(5), "labels": labels})
    expected = -(logits.double() - logits.double().logsumexp(1, keepdim=True))[range(5), labels].mean()
    assert out.loss.double() == pytest.approx(float(expected), rel=1e-6)
    assert out.weight == 5


def test_epoch_figures_weigh_examples_and_not_batches():
    task = SequenceClassification(2)
    logits, labels = torch.randn(10, 2), torch.randint(0, 2, (10,))
    for part in (slice(0, 7), slice(7, 10)):
        out = task.step(Logits(logits[part], "tensor"), {"x": logits, "labels": labels[part]})
        metrics = task.update("val", out)
    assert float(metrics["val/accuracy"].compute()) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    whole = nn.functional.cross_entropy(logits, labels)
    assert float(metrics["val/loss"].compute()) == pytest.approx(float(whole), rel=1e-6)


def test_stages_are_counted_apart():
    task = SequenceClassification(2)
    right = task.step(Logits(torch.eye(2), "tensor"), {"x": 0, "labels": torch.tensor([0, 1])})
    wrong = task.step(Logits(torch.eye(2), "tensor"), {"x": 0, "labels": torch.tensor([1, 0])})
    assert float(task.update("train", right)["train/accuracy"].compute()) == 1.0
    assert float(task.update("val", wrong)["val/accuracy"].compute()) == 0.0


def test_predictions_need_no_labels():
    out = SequenceClassification(2).predict(Logits(torch.tensor([[0.0, 2.0]]), "tensor"), {"x": 0})
    assert out["prediction"].tolist() == [1]
    assert float(out["probabilities"].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("logits", "batch", "said"),
    [
        (torch.zeros(2, 3), {"x": 0, "labels": torch.zeros(2).long()}, r"give its head 2 outputs"),
        (torch.zeros(2, 2), {"x": 0}, "no 'labels'"),
        (torch.zeros(2, 2), [1, 2], "must map names to tensors"),
        ("no tensor", {"x": 0, "labels": torch.zeros(2).long()}, "must return logits"),
    ],
)
def test_a_misfit_is_named(logits, batch, said):
    with pytest.raises(LoRAError, match=said):
        SequenceClassification(2).step(Logits(logits, "tensor"), batch)


def test_one_class_is_no_classification():
    with pytest.raises(LoRAError, match="at least 2 classes, got 1"):
        SequenceClassification(1)
