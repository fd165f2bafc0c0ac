"""Each named metric is scikit-learn's, over batches as over all; the first one named is monitored."""

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_lightning import LoRAError, SequenceClassification
from lora_lightning.tasks.base import StepOutput
from lora_lightning.tasks.metrics.classification import METRICS

REFERENCE = {
    "accuracy": accuracy_score,
    "f1": lambda t, y: f1_score(t, y, average="macro"),
    "binary_f1": f1_score,
    "matthews": matthews_corrcoef,
}


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_are_scikit_learns(classes):
    names = [name for name in METRICS if classes == 2 or name != "binary_f1"]
    logits, labels = torch.randn(50, classes), torch.randint(0, classes, (50,))
    task = SequenceClassification(classes, metrics=names)
    # A first batch in which several metrics count alike by chance: all wrong, as often one way as the other.
    logits[:2, :2], labels[:2] = torch.tensor([[1.0, 0.0], [0.0, 1.0]]) + 10, torch.tensor([1, 0])
    for part in (slice(0, 2), slice(2, 30), slice(30, 50)):
        out = StepOutput(torch.tensor(0.0), 1, predictions=logits[part], targets=labels[part])
        metrics = task.update("val", out)
    for name in names:
        expected = REFERENCE[name](labels.numpy(), logits.argmax(1).numpy())
        assert float(metrics[f"val/{name}"].compute()) == pytest.approx(expected, rel=1e-5), name


def test_the_first_metric_is_monitored_and_only_what_is_named_is_counted():
    task = SequenceClassification(2, metrics=["matthews", "accuracy"])
    assert (task.monitor, task.monitor_mode) == ("val/matthews", "max")
    out = StepOutput(torch.tensor(0.0), 2, predictions=torch.eye(2), targets=torch.tensor([0, 1]))
    assert set(task.update("test", out)) == {"test/loss", "test/matthews", "test/accuracy"}
    assert SequenceClassification(2).monitor == "val/accuracy"


@pytest.mark.parametrize(
    ("classes", "names", "said"),
    [
        (2, [], "name at least one of accuracy, f1, binary_f1, matthews"),
        (2, ["acuracy"], "'acuracy' is none of accuracy, .*did you mean 'accuracy'"),
        (3, ["binary_f1"], "binary_f1 is the F1 of class 1 of 2, and there are 3 classes"),
    ],
)
def test_a_metric_that_means_nothing_is_refused(classes, names, said):
    with pytest.raises(LoRAError, match=said):
        SequenceClassification(classes, metrics=names)
