"""Loss, decisions and metrics against their formulas and scikit-learn's."""

import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from lora_lightning import LoRAError
from lora_lightning.tasks.classification import MultiLabelClassification
from lora_lightning.training.callbacks.prediction_writer import rows


class Says(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits


@pytest.mark.parametrize("over_labels", ["mean", "sum"])
def test_loss_is_the_binary_cross_entropy_of_each_label(over_labels):
    z, t = torch.randn(5, 3), torch.randint(0, 2, (5, 3))
    out = MultiLabelClassification(3, over_labels=over_labels).step(Says(z), {"x": 0, "labels": t.float()})
    each = -(t * z.double().sigmoid().log() + (1 - t) * (1 - z.double().sigmoid()).log())
    expected = getattr(each, over_labels)(1).mean()
    assert float(out.loss) == pytest.approx(float(expected), rel=1e-6)
    assert out.weight == 5


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_metrics_over_batches_are_scikit_learns_over_all(threshold):
    z, t = torch.randn(40, 4), torch.randint(0, 2, (40, 4))
    task = MultiLabelClassification(4, threshold)
    for part in (slice(0, 25), slice(25, 40)):
        metrics = task.update("test", task.step(Says(z[part]), {"x": 0, "labels": t[part]}))
    said = (z.sigmoid() > threshold).int()
    for average in ("micro", "macro"):
        expected = f1_score(t.numpy(), said.numpy(), average=average)
        assert float(metrics[f"test/{average}_f1"].compute()) == pytest.approx(expected, rel=1e-6)
    whole = float((said == t).all(1).float().mean())
    assert float(metrics["test/subset_accuracy"].compute()) == pytest.approx(whole)


def test_predictions_are_the_labels_above_the_threshold_with_their_names():
    batch = MultiLabelClassification(3, 0.6).predict(
        Says(torch.tensor([[2.0, 0.1, 1.0], [-1.0, -1.0, -1.0]])), {"x": 0}
    )
    said = list(rows([batch], [[0, 1]], ["sport", "tech", "money"]))
    assert [row["prediction"] for row in said] == [[0, 2], []]
    assert [row["labels"] for row in said] == [["sport", "money"], []]
    assert said[0]["probabilities"] == pytest.approx(torch.tensor([2.0, 0.1, 1.0]).sigmoid().tolist())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MultiLabelClassification(1), "at least 2 labels, got 1"),
        (lambda: MultiLabelClassification(3, 1.5), "threshold must be a probability above 0 and below 1, got 1.5"),
        (lambda: MultiLabelClassification(3, over_labels="max"), "over_labels must be mean or sum, got 'max'"),
        (lambda: _step(torch.zeros(2, 4), torch.zeros(2, 3)), "one for each label, got .* give its head 3 outputs"),
        (lambda: _step(torch.zeros(2, 3), torch.zeros(2)), r"a 0 or 1 for each label, got \(2,\)"),
    ],
)
def test_a_misfit_is_named(make, said):
    with pytest.raises(LoRAError, match=said):
        make()


def _step(logits, labels):
    return MultiLabelClassification(3).step(Says(logits), {"x": 0, "labels": labels})
