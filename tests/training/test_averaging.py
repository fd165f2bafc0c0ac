"""Law 9 in one process: the optimizer sees the mean over all units of its step, however they lie in batches."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, default_collate

from lora_lightning import LoRAError, LoRAModule
from lora_lightning.training.loss_weighting import UnitMean
from tests.training.ragged import CLIP, ROWS, Ragged, assert_alike, fit, module, rows


@pytest.mark.parametrize("n", [3, 4])
def test_accumulated_batches_equal_the_whole_batch(n):
    assert_alike(fit(4, accumulate_grad_batches=n), fit(4 * n))


def test_a_loss_scaler_changes_nothing():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaled = fit(4, accumulate_grad_batches=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert_alike(scaled, fit(16))
    assert scaler.get_scale() == 2.0**16, "no step was skipped"


class Masked(Ragged):
    """Each second micro-batch has nothing to train on, or is left out."""

    def __init__(self, *, left_out=False):
        super().__init__(2)
        self.left_out = left_out

    def loader(self, data):
        kept = []
        for i, row in enumerate(data):
            masked = (i // 2) % 2 == 1
            if not (masked and self.left_out):
                kept.append(row | {"labels": torch.full_like(row["labels"], -100) if masked else row["ids"]})
        return super().loader(kept)


def test_a_micro_batch_without_labels_counts_for_nothing_and_stops_nothing():
    masked = fit(Masked(), accumulate_grad_batches=2, max_steps=6)
    assert_alike(masked, fit(Masked(left_out=True), max_steps=6), 1e-12)


class Look(Callback):
    """The gradients of the first step as a callback sees them, and the trainer as it is within a fit."""

    def __init__(self):
        self.gradients = self.trainer = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients is None:
            trained = {k: p for k, p in pl_module.named_parameters() if p.requires_grad}
            self.gradients = {k: p.grad.clone() for k, p in trained.items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.trainer = trainer


def assert_first_gradients_are(loss_of, model):
    """Those of `loss_of()` over the first six rows, which were three batches of a step."""
    look = Look()
    fit(2, look, accumulate_grad_batches=3, max_steps=1)
    loss_of(model).backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(look.gradients[key], p.grad, rtol=1e-11, atol=1e-16)
    return sum(float(g.square().sum()) for g in look.gradients.values()) ** 0.5


def test_callbacks_see_the_gradient_of_the_mean_over_all_tokens_before_it_is_clipped():
    batch = rows(ROWS, seed=1)[:6]
    labels = torch.stack([row["labels"] for row in batch])

    def mean(model):
        logits = model.backbone(torch.stack([row["ids"] for row in batch]))
        log_p = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -(log_p * (labels != -100)).sum() / (labels != -100).sum()

    assert assert_first_gradients_are(mean, module()) > CLIP


def test_a_training_step_of_ones_own_is_lightnings(monkeypatch):
    def own(self, batch, batch_idx):
        out = self.task.step(self.backbone, batch)
        return out.loss * out.weight

    monkeypatch.setattr(LoRAModule, "training_step", own)
    batches = [default_collate(rows(ROWS, seed=1)[i : i + 2]) for i in (0, 2, 4)]
    assert_first_gradients_are(lambda model: sum(own(model, batch, 0) for batch in batches) / 3, module())


def test_one_process_without_accumulation_takes_the_tasks_own_loss():
    fit(4, look := Look(), max_steps=1)
    loss = torch.tensor(0.3, requires_grad=True)
    assert UnitMean().weigh(look.trainer, loss, 7, 0) is loss


@pytest.mark.parametrize("n", [1, 2])
def test_a_step_that_trains_on_nothing_is_refused(n):
    nothing = [{"ids": row["ids"], "labels": torch.full_like(row["labels"], -100)} for row in rows(4, seed=1)]
    with pytest.raises(LoRAError, match="nothing is trained on: no batch of this optimizer step"):
        fit(DataLoader(nothing, batch_size=2), accumulate_grad_batches=n)


def test_an_empty_batch_with_a_loss_that_is_not_finite_is_refused():
    fit(4, look := Look(), max_steps=1, accumulate_grad_batches=2)
    with pytest.raises(LoRAError, match=r"a batch of no units must have a loss of 0 .* got nan"):
        UnitMean().weigh(look.trainer, torch.tensor(float("nan")), 0, 0)
