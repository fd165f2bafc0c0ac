"""Every task with labels: loss, weight and figures against arithmetic of their own in float64, however a set is cut."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, top_k_accuracy_score
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from lora_lightning import MultiLabelClassification, SequenceClassification, SequenceRegression
from lora_lightning.tasks.classification import METRICS, ImageClassification
from lora_lightning.tasks.segmentation import ImageSegmentation
from lora_lightning.tasks.supervised import Supervised
from lora_lightning.tasks.token_classification import EntityF1, TokenClassification
from lora_lightning.training.callbacks.prediction_writer import rows

IOB2 = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
DRAW = torch.Generator().manual_seed(0)


class Says(nn.Module):
    """A backbone that gives what it was made with."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


@dataclass
class Case:
    """A task over logits z and labels y of a whole set; `loss` is the mean over `weight` units, figures are of all."""

    task: Callable[[], Any]
    z: Tensor
    y: Tensor
    loss: float
    weight: int
    figures: dict[str, float] = field(default_factory=dict)
    monitor: str = "val/accuracy"
    key: str | None = "x"
    """The backbone's argument; None where a batch is (inputs, targets)."""

    def step(self, task, part=slice(None)):
        """On these rows."""
        x = torch.zeros(len(self.y[part]), 3, 4, 4) if self.key == "pixel_values" else torch.zeros(len(self.y[part]), 2)
        batch = (x, self.y[part]) if self.key is None else {self.key: x, "labels": self.y[part]}
        return task.step(Says(self.z[part]), batch)


def normal(*shape):
    return torch.randn(*shape, generator=DRAW)


def below(high, *shape):
    return torch.randint(high, shape, generator=DRAW)


def one_label(make, classes, smoothing=0.0, key="x", **figures):
    """Of 50 examples, the first two wrong, as often one way as the other: several metrics count alike there."""
    z, y = normal(50, classes), below(classes, 50)
    z[:2, :2], y[:2] = torch.eye(2) * 10 + 10, torch.tensor([1, 0])
    target = torch.full(z.shape, smoothing / classes).double()
    target[range(50), y] += 1 - smoothing
    t, said = y.numpy(), z.argmax(1).numpy()
    every = {
        "accuracy": accuracy_score(t, said),
        "f1": f1_score(t, said, average="macro"),
        "binary_f1": f1_score(t, said) if classes == 2 else None,
        "matthews": matthews_corrcoef(t, said),
        "accuracy_top5": top_k_accuracy_score(t, z.numpy(), k=5) if classes > 5 else None,
    }
    figures = {name: every[name] for name in figures or METRICS if every[name] is not None}
    return Case(make, z, y, -(target * z.double().log_softmax(1)).sum(1).mean(), 50, figures, key=key)


def several_labels(over, threshold):
    z, y = normal(40, 4), below(2, 40, 4)
    p, said = z.double().sigmoid(), (z.sigmoid() > threshold).int()
    figures = {f"{average}_f1": f1_score(y.numpy(), said.numpy(), average=average) for average in ("micro", "macro")}
    figures["subset_accuracy"] = accuracy_score(y.numpy(), said.numpy())
    loss = getattr(-(y * p.log() + (1 - y) * (1 - p).log()), over)(1).mean()
    task = lambda: MultiLabelClassification(4, threshold, over_labels=over)  # noqa: E731
    return Case(task, z, y, loss, 40, figures, "val/micro_f1")


def numbers():
    z = normal(11).double()
    y = z + normal(11)
    ranks = [np.argsort(np.argsort(values.numpy())) for values in (z, y)]
    figures = {"pearson": np.corrcoef(z, y)[0, 1], "spearman": np.corrcoef(*ranks)[0, 1]}
    return Case(SequenceRegression, z.unsqueeze(1), y, ((z - y) ** 2).mean(), 11, figures, "val/pearson")


def tagged():
    z, y = normal(12, 7, 5), below(6, 12, 7) - 1
    y[y == -1] = -100
    known = y != -100
    once = EntityF1(IOB2)  # which is seqeval's, see test_token_classification
    once.update(z.argmax(-1), y)
    figures = {"accuracy": accuracy_score(y[known], z.argmax(-1)[known]), "f1": float(once.compute())}
    loss = -z.double().log_softmax(-1)[known].gather(1, y[known, None]).mean()
    return Case(lambda: TokenClassification(IOB2), z, y, loss, int(known.sum()), figures, "val/f1")


def pixels():
    """A class that is neither there nor said counts for nothing, nor do ignored pixels."""
    z, y = normal(5, 4, 8, 8), below(3, 5, 8, 8)
    z[:, 3] = -9
    y.view(-1)[torch.randperm(y.numel(), generator=DRAW)[:40]] = 255
    said, known = z.argmax(1), y != 255
    iou = [((said == c) & (y == c)).sum() / (((said == c) & known) | (y == c)).sum() for c in range(3)]
    figures = {"miou": float(sum(iou) / 3), "pixel_accuracy": accuracy_score(y[known], said[known])}
    loss = -z.double().log_softmax(1).movedim(1, -1)[known].gather(1, y[known, None]).mean()
    return Case(lambda: ImageSegmentation(4), z, y, loss, 280, figures, "val/miou", "pixel_values")


def own(reduction, weights=None):
    z, y = normal(10, 4), torch.tensor([3, 0, 1, 1, 2, 3, 0, 0, 2, 1])
    each = torch.ones(10) if weights is None else weights[y] * (y != 3)
    loss_of = nn.CrossEntropyLoss(weights, ignore_index=-100 if weights is None else 3, reduction=reduction)
    accuracy = {"accuracy": MulticlassAccuracy(4, average="micro")}
    task = lambda: Supervised(loss_of, accuracy, monitor="accuracy")  # noqa: E731
    loss = -(z.double().log_softmax(1)[range(10), y] * each).sum() / each.sum()
    return Case(task, z, y, loss, float(each.sum()), {"accuracy": accuracy_score(y, z.argmax(1))}, key=None)


def own_numbers():
    """Metrics that start alike are counted apart: the first row's error is 1, so that mae and mse agree."""
    z, y = torch.arange(8.0), torch.arange(8.0) + torch.tensor([1.0, 3, 0, 2, 5, 1, 1, 2])
    task = lambda: Supervised(nn.MSELoss(), {"mae": MeanAbsoluteError(), "mse": MeanSquaredError()}, monitor="mae")  # noqa: E731
    error = (z - y).double()
    mse = float((error**2).mean())
    return Case(task, z, y, mse, 8, {"mae": float(error.abs().mean()), "mse": mse}, "val/mae", None)


CASES = {
    "two classes": one_label(lambda: SequenceClassification(2, metrics=list(METRICS)), 2),
    "four classes": one_label(lambda: SequenceClassification(4, metrics=[m for m in METRICS if m != "binary_f1"]), 4),
    "images": one_label(lambda: ImageClassification(12), 12, 0, "pixel_values", accuracy=1, f1=1, accuracy_top5=1),
    "smoothed": one_label(lambda: ImageClassification(3, label_smoothing=0.3), 3, 0.3, "pixel_values", f1=1),
    "labels": several_labels("mean", 0.3),
    "summed labels": several_labels("sum", 0.5),
    "numbers": numbers(),
    "tags": tagged(),
    "pixels": pixels(),
    **{f"own {reduction}": own(reduction) for reduction in ("mean", "sum", "none")},
    "own, weighted, the first ignored": own("mean", torch.tensor([1.0, 2.5, 0.5, 7])),
    "own numbers": own_numbers(),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_weight_and_figures_are_those_by_hand_however_the_set_is_cut(name):
    case = CASES[name]
    task = case.task()
    out = case.step(task)
    assert float(out.loss) == pytest.approx(float(case.loss), rel=1e-6)
    assert out.weight == case.weight
    assert task.monitor == case.monitor
    assert task.monitor_mode == ("min" if name == "own numbers" else "max")
    for start, end in ((0, 1), (1, 4), (4, len(case.y))):
        task.update("train", case.step(task, slice(0, 2)))  # stages are counted apart
        metrics = task.update("val", case.step(task, slice(start, end)))
    found = {key.removeprefix("val/"): float(metric.compute()) for key, metric in metrics.items()}
    assert found.pop("loss") == pytest.approx(float(case.loss), rel=1e-6)
    assert {key: found[key] for key in case.figures} == pytest.approx(case.figures, rel=1e-5)
    assert set(metrics) == set(task.logged("val"))


def test_only_what_is_named_is_counted_and_a_top_5_from_ten_classes_on():
    task = SequenceClassification(2, metrics=["matthews", "accuracy"])
    assert (task.monitor, task.monitor_mode) == ("val/matthews", "max")
    assert set(task.logged("test")) == {"test/loss", "test/matthews", "test/accuracy"}
    assert "val/accuracy_top5" not in ImageClassification(9).logged("val")
    words = TokenClassification(["NOUN", "VERB", "I-x"], entities=False)
    assert (words.monitor, set(words.logged("val"))) == ("val/accuracy", {"val/loss", "val/accuracy"})
    assert Supervised(nn.MSELoss()).monitor == "val/loss"


def test_coarse_maps_are_upsampled_to_the_mask_and_a_mask_without_a_label_counts_for_nothing():
    z, y = torch.randn(2, 3, 4, 4), CASES["pixels"].y[:2]
    fine = F.interpolate(z, size=(8, 8), mode="bilinear", align_corners=False)
    forms = ({"out": z}, fine, (z, None))  # logits come as a mapping, a tensor or a tuple
    losses = [ImageSegmentation(3).step(Says(form), {"x": 0, "labels": y}).loss for form in forms]
    assert losses[0] == losses[1] == losses[2]
    z.requires_grad_()
    out = ImageSegmentation(3).step(Says(z), {"x": 0, "labels": torch.full_like(y, 255)})
    out.loss.backward()
    assert (float(out.loss), out.weight, float(z.grad.abs().sum())) == (0.0, 0, 0.0)


def test_segformers_loss_is_its_own():
    sizes = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 8], "patch_sizes": [3, 3], "strides": [2, 2]}
    heads = {"num_attention_heads": [1, 1], "mlp_ratios": [1, 1], "decoder_hidden_size": 8, "num_labels": 3}
    net = SegformerForSemanticSegmentation(SegformerConfig(num_encoder_blocks=2, **sizes, **heads)).eval()
    batch = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": CASES["pixels"].y[:2]}
    torch.testing.assert_close(ImageSegmentation(3).step(net, batch).loss, net(**batch).loss)
    assert ImageSegmentation(3).predict(net, batch)["prediction"].shape == (2, 8, 8)


def test_predictions_need_no_labels():
    z = torch.tensor([[0.0, 2.0, 1.0]])
    for task in (SequenceClassification(3), ImageClassification(3)):
        key = "pixel_values" if isinstance(task, ImageClassification) else "x"
        out = task.predict(Says(z), {key: torch.zeros(1, 3, 4, 4)})
        assert out["prediction"].tolist() == [1]
        torch.testing.assert_close(out["probabilities"], z.softmax(1))
    for shape in ((4,), (4, 1)):
        assert SequenceRegression().predict(Says(torch.ones(shape)), {"x": 0})["prediction"].tolist() == [1.0] * 4
    z = torch.tensor([[2.0, 0.1, 1.0], [-1.0, -1.0, -1.0]])
    several = MultiLabelClassification(3, 0.6).predict(Says(z), {"x": 0})
    said = list(rows([several], [[0, 1]], ["sport", "tech", "money"]))
    assert [(row["prediction"], row["labels"]) for row in said] == [([0, 2], ["sport", "money"]), ([], [])]
    assert said[0]["probabilities"] == pytest.approx(z[0].sigmoid().tolist())


class Two(nn.Module):
    def forward(self, x, factor=None):
        return {"logits": x * (1 if factor is None else factor), "other": -x}


def test_the_plain_task_takes_batches_of_either_form_and_names_of_input_target_and_output():
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    task = Supervised(nn.MSELoss(), {"mae": MeanAbsoluteError()})
    for batch in ({"x": x, "labels": y}, (x, y), [x, y], ({"x": x}, y), ((x,), y)):
        assert float(task.step(Two(), batch).loss) == pytest.approx(float((x - y).square().mean()))
        assert torch.equal(task.predict(Two(), batch)["prediction"], x)
        assert list(task.inputs(Two(), batch)) == ["x"]
    assert torch.equal(task.predict(Two(), x)["prediction"], x)
    assert task.inputs(Two(), ((x, y), y)).keys() == {"x", "factor"}
    named = Supervised(nn.L1Loss(), target="y", inputs=["x"], output="other")
    loss = named.step(Two(), {"x": x, "y": y, "name": ["a"] * 5}).loss
    assert float(loss) == pytest.approx(float((x + y).abs().mean()))
    soft = Supervised(nn.CrossEntropyLoss(), prediction=nn.Softmax(-1)).predict(nn.Identity(), torch.zeros(2, 4))
    assert soft["prediction"].tolist() == [[0.25] * 4] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_target_of_numbers_is_not_broadcast(dtype):
    """(n,) beside (n, 1) would be n x n differences, and a loss that looks like one."""
    x, y = torch.randn(6, 1), (3 * torch.randn(6)).to(dtype)
    task = Supervised(nn.MSELoss(), {"mse": MeanSquaredError()})
    out = task.step(nn.Identity(), (x, y))
    assert float(out.loss) == pytest.approx(float((x.squeeze(1) - y).square().mean()), rel=1e-6)
    assert out.loss.dtype == torch.float32
    assert float(task.update("val", out)["val/mse"].compute()) == pytest.approx(float(out.loss), rel=1e-6)
    copy.deepcopy(task)
