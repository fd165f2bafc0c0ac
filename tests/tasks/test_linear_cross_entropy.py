"""Linear and cross-entropy in one: the plain way's loss and gradients, in less memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning.tasks.losses import linear_cross_entropy as module
from lora_lightning.tasks.losses.linear_cross_entropy import Terms, linear_cross_entropy

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 2.0},
    {"logit_scale": 0.3},
    {"label_smoothing": 0.2, "softcap": 1.5, "logit_scale": 2.5},
]


def in_one(hidden, weight, labels, *, bias=None, label_smoothing=0.0, softcap=None, logit_scale=1.0):
    head = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    head.weight, head.bias = (t if t is None or t.requires_grad else nn.Parameter(t, False) for t in (weight, bias))
    return linear_cross_entropy(head, hidden, labels, len(weight), Terms(softcap, logit_scale), label_smoothing)


def data(n=37, d=8, vocabulary=50, ignored=0.3, dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d, dtype=dtype), torch.randn(vocabulary, d, dtype=dtype)
    labels = torch.randint(vocabulary, (n,))
    labels[: n // 3] = (hidden @ weight.t())[: n // 3].argmax(-1)  # some are right
    labels[torch.rand(n) < ignored] = -100
    return hidden, weight, torch.randn(vocabulary, dtype=dtype), labels


def plain(hidden, weight, labels, *, bias=None, label_smoothing=0.0, softcap=None, logit_scale=1.0):
    z = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, labels, reduction="sum", label_smoothing=label_smoothing)
    return loss, (z.argmax(-1) == labels).sum()


@pytest.mark.parametrize(
    ("options", "with_bias", "rows"),
    [(options, n % 2 == 0, rows) for n, options in enumerate(OPTIONS * 2) for rows in ((1, 5, 1000)[n % 3], 5)],
    ids=str,
)
def test_loss_gradients_and_hits_are_the_plain_ways(options, with_bias, rows, monkeypatch):
    monkeypatch.setattr(module, "rows_at_once", lambda hidden, vocabulary: rows)
    hidden, weight, bias, labels = data()
    leaves = [hidden.requires_grad_(True), *(nn.Parameter(t) for t in ([weight, bias] if with_bias else [weight]))]
    weight, bias = leaves[1], leaves[-1]
    given = {"bias": bias if with_bias else None, **options}
    ours = in_one(hidden, weight, labels, **given)
    loss, correct = plain(hidden, weight, labels, **given)
    for leaf in leaves[1:]:  # what needs no gradient gets none; backward may be called again
        (alone,) = torch.autograd.grad(3 * ours.loss, leaf, retain_graph=True)
        torch.testing.assert_close(alone, 3 * torch.autograd.grad(ours.loss, leaf, retain_graph=True)[0])
    assert float((ours.loss - loss).abs() / loss) < 1e-12
    assert (ours.count, int(ours.correct)) == (int((labels != -100).sum()), int(correct))
    assert int(correct) > 0
    both = (torch.autograd.grad(1.7 * value, leaves) for value in (ours.loss, loss))
    for got, expected in zip(*both, strict=True):
        assert float((got - expected).abs().max()) < 1e-12 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_no_further_from_the_truth_than_the_plain_way(dtype):
    hidden, weight, _, labels = data(n=64, d=32, vocabulary=3000)
    low, weight = hidden.to(dtype).requires_grad_(True), (0.2 * weight).to(dtype)
    wide = low.detach().double().requires_grad_(True)
    plain(wide, weight.double(), labels)[0].backward()
    errors = []
    for loss in (plain(low, weight, labels)[0], in_one(low, weight, labels).loss):
        assert loss.dtype == torch.float32
        (got,) = torch.autograd.grad(loss / 3, low)
        errors.append(float((got.double() * 3 - wide.grad).norm()))
    assert errors[1] <= 1.2 * errors[0]


def test_a_loss_scalers_factor_does_not_overflow_float16():
    hidden, weight, _, labels = data(n=8, dtype=torch.float32)
    low = (0.01 * hidden).half().requires_grad_(True)
    scaled = in_one(low, (1e-3 * weight).half(), labels).loss * 2.0**17
    (got,) = torch.autograd.grad(scaled, low)
    assert torch.isfinite(got).all()
    assert float(got.abs().max()) > 100


def test_it_may_stand_in_a_compiled_function():
    hidden, weight, _, labels = data()
    hidden.requires_grad_(True)

    @torch.compile(backend="eager")
    def within(h):
        return in_one(torch.sin(h), weight, labels, softcap=3.0).loss * 2

    within(hidden).backward()
    expected = torch.autograd.grad(2 * plain(torch.sin(hidden), weight, labels, softcap=3.0)[0], hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-13)
