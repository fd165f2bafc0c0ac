"""The plain task: any loss and metrics, batches of either form, and means over what a loss is a mean of."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lora_lightning import LoRAError
from lora_lightning.tasks.supervised import Supervised


class Two(nn.Module):
    """Takes two inputs by name and gives a mapping."""

    def forward(self, x, factor=None):
        return {"logits": x * (1 if factor is None else factor), "other": -x}


def test_batches_of_either_form_give_the_same():
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    task = Supervised(nn.MSELoss(), {"mae": MeanAbsoluteError()})
    expected = float((x - y).square().mean())
    for batch in ({"x": x, "labels": y}, (x, y), [x, y], ({"x": x}, y), ((x,), y)):
        out = task.step(Two(), batch)
        assert float(out.loss) == pytest.approx(expected)
        assert out.weight == 5
        assert torch.equal(task.predict(Two(), batch)["prediction"], x)
        assert list(task.inputs(Two(), batch)) == ["x"]
    assert torch.equal(task.predict(Two(), x)["prediction"], x)
    assert task.inputs(Two(), ((x, y), y)).keys() == {"x", "factor"}


def test_names_of_target_inputs_and_output():
    x, y = torch.randn(4, 2), torch.randn(4, 2)
    task = Supervised(nn.L1Loss(), target="y", inputs=["x"], output="other")
    out = task.step(Two(), {"x": x, "y": y, "name": ["a"] * 4})
    assert float(out.loss) == pytest.approx(float((-x - y).abs().mean()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_of_any_reduction_is_the_mean_and_batches_weigh_what_they_hold(reduction):
    x, y = torch.randn(10, 4), torch.randint(0, 4, (10,))
    task = Supervised(nn.CrossEntropyLoss(reduction=reduction), {"accuracy": MulticlassAccuracy(4, average="micro")})
    for rows in (slice(0, 7), slice(7, 10)):
        metrics = task.update("val", task.step(nn.Identity(), (x[rows], y[rows])))
    assert float(metrics["val/loss"].compute()) == pytest.approx(float(F.cross_entropy(x, y)), rel=1e-6)
    assert float(metrics["val/accuracy"].compute()) == pytest.approx(float((x.argmax(1) == y).float().mean()))


def test_a_target_of_numbers_is_not_broadcast():
    """(n,) beside (n, 1) would be n x n differences, and a loss that looks like one."""
    x, y = torch.randn(6, 1), torch.randn(6, dtype=torch.float64)
    task = Supervised(nn.MSELoss(), {"mse": MeanSquaredError()})
    out = task.step(nn.Identity(), (x, y))
    assert float(out.loss) == pytest.approx(float((x.squeeze(1) - y).square().mean()), rel=1e-6)
    assert out.loss.dtype == torch.float32
    assert float(task.update("val", out)["val/mse"].compute()) == pytest.approx(float(out.loss), rel=1e-6)
    with pytest.raises(LoRAError, match=r"must have the outputs' shape \(6, 1\), got \(6, 2\)"):
        task.step(nn.Identity(), (x, torch.randn(6, 2)))
    with pytest.raises(LoRAError, match=r"the outputs' shape \(2, 3\), got \(3, 2\)"):
        task.step(nn.Identity(), (torch.randn(2, 3), torch.randn(3, 2)))


def test_what_is_monitored_knows_its_direction():
    accuracy = {"accuracy": MulticlassAccuracy(3)}
    task = Supervised(nn.CrossEntropyLoss(), accuracy, monitor="accuracy")
    assert (task.monitor, task.monitor_mode) == ("val/accuracy", "max")
    task = Supervised(nn.MSELoss(), {"mae": MeanAbsoluteError()}, monitor="mae")
    assert (task.monitor, task.monitor_mode) == ("val/mae", "min")
    assert Supervised(nn.MSELoss()).monitor == "val/loss"


def test_predictions_go_through_what_is_named():
    out = Supervised(nn.CrossEntropyLoss(), prediction=nn.Softmax(-1)).predict(nn.Identity(), torch.zeros(2, 4))
    assert out["prediction"].tolist() == [[0.25] * 4] * 2


def test_metrics_that_start_alike_are_counted_apart():
    task = Supervised(nn.MSELoss(), {"mae": MeanAbsoluteError(), "mse": MeanSquaredError()})
    task.update("val", task.step(nn.Identity(), (torch.zeros(2), torch.ones(2))))
    metrics = task.update("val", task.step(nn.Identity(), (torch.zeros(2), torch.full((2,), 3.0))))
    assert [float(metrics[f"val/{name}"].compute()) for name in ("mae", "mse")] == [2, 5]


X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda t: t.step(Two(), {"x": X, "label": X}), r"no target 'labels'; did you mean 'label'"),
        (lambda t: t.step(Two(), (X,)), "no target 'labels'"),
        (lambda t: t.step(Two(), (X, X, X)), r"must map names to tensors or be \(inputs, target\), got a tuple of 3"),
        (lambda t: t.step(Two(), 3), "got a int"),
        (lambda t: Supervised(nn.MSELoss(), inputs=["z"]).step(Two(), {"x": X, "labels": X}), "no 'z', which inputs"),
        (
            lambda t: Supervised(nn.MSELoss(), output="othr").step(Two(), (X, X)),
            "returns no 'othr'; did you mean 'other'",
        ),
        (lambda t: t.step(nn.LSTM(3, 2), (X, X)), "must return a tensor, or a mapping with its output, got tuple"),
        (lambda t: Supervised(nn.MSELoss(), {"loss": MeanSquaredError()}), "'loss' is logged anyway"),
        (lambda t: Supervised(nn.MSELoss(), monitor="acc"), "monitor is one of loss, got 'acc'"),
    ],
)
def test_a_misfit_is_named(act, said):
    with pytest.raises(LoRAError, match=said):
        act(Supervised(nn.MSELoss()))
