"""Law 9: the optimizer sees the mean over all units of its step, however they lie in batches and processes."""

import functools
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader, default_collate

from lora_lightning import LoRAError, LoRAModule
from lora_lightning.training.loss_weighting import UnitMean, multiply_gradients
from tests.command.process import REPOSITORY
from tests.distributed import one_process
from tests.training.ragged import CLIP, ROWS, fit, module, rows

ACCUMULATED = [1, 3, 4]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """By the number of accumulated batches, what rank 0 of two processes with batches of 2 had; `four` is another."""
    folder = tmp_path_factory.mktemp("ragged")
    # In a process of its own: the first backward must not come before the fork.
    command = [sys.executable, "-m", "tests.training.ragged", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {n: torch.load(folder / f"{n}.pt") for n in [*ACCUMULATED, "four"]}


def assert_alike(ours, whole):
    assert ours["steps"] == whole["steps"] >= 20
    for key, value in whole["adapter"].items():
        assert float((ours["adapter"][key] - value).abs().max() / value.abs().max()) < 1e-12, key
    assert ours["losses"] == pytest.approx(whole["losses"], rel=1e-12)
    assert ours["metrics"] == pytest.approx(whole["metrics"], rel=1e-6)
    assert {"train/loss", "val/loss", "train/accuracy", "val/accuracy"} <= set(ours["metrics"])


@functools.cache
def whole(n):
    """One process with all of a step's rows in one batch."""
    return fit(4 * n)


@pytest.mark.parametrize("n", ACCUMULATED)
def test_two_processes_and_accumulated_batches_equal_the_whole_batch(two_processes, n):
    assert_alike(two_processes[n], whole(n))


def test_four_processes_with_three_batches_of_one_row_equal_the_whole_batch(two_processes):
    assert_alike(two_processes["four"], whole(3))


@pytest.mark.parametrize("n", ACCUMULATED[1:])
def test_accumulated_batches_equal_the_whole_batch(n):
    assert_alike(fit(4, accumulate_grad_batches=n), whole(n))


def test_some_batches_of_these_fits_have_no_tokens_at_all():
    counts = [int((row["labels"] != -100).sum()) for row in rows(ROWS, seed=1)]
    of_batches = [sum(counts[i : i + 4 : 2]) for i in (0, 1)] + [sum(counts[i : i + 2]) for i in range(0, ROWS, 2)]
    assert 0 in of_batches
    assert max(of_batches) > 10


def test_a_loss_scaler_changes_nothing():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert_alike(fit(4, accumulate_grad_batches=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]), whole(4))
    assert scaler.get_scale() == 2.0**16, "no step was skipped"


class Look(Callback):
    """The gradients of the first step, as a callback sees them."""

    def __init__(self):
        self.gradients = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients is None:
            trained = {k: p for k, p in pl_module.named_parameters() if p.requires_grad}
            self.gradients = {k: p.grad.clone() for k, p in trained.items()}


def test_callbacks_see_the_gradient_of_the_mean_over_all_tokens_before_it_is_clipped():
    look = Look()
    fit(2, look, accumulate_grad_batches=3, max_steps=1)
    model, batch = module(), rows(ROWS, seed=1)[:6]
    logits = model.backbone(torch.stack([row["ids"] for row in batch]))
    labels = torch.stack([row["labels"] for row in batch])
    log_p = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    (-(log_p * (labels != -100)).sum() / (labels != -100).sum()).backward()
    assert sum(float(g.square().sum()) for g in look.gradients.values()) ** 0.5 > CLIP
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(look.gradients[key], p.grad, rtol=1e-12, atol=1e-16)


def trainer_of(fitted):
    """A trainer as it is within a fit of these options."""

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            fitted["trainer"] = trainer

    return Keep()


def test_one_process_without_accumulation_takes_the_tasks_own_loss():
    fitted = {}
    fit(4, trainer_of(fitted), max_steps=1)
    loss = torch.tensor(0.3, requires_grad=True)
    assert UnitMean().weigh(fitted["trainer"], loss, 7, 0) is loss


@pytest.mark.parametrize("n", [1, 2])
def test_a_step_that_trains_on_nothing_is_refused(n):
    nothing = [{"ids": row["ids"], "labels": torch.full_like(row["labels"], -100)} for row in rows(4, seed=1)]
    with pytest.raises(LoRAError, match="nothing is trained on: no batch of this optimizer step"):
        fit(2, data=DataLoader(nothing, batch_size=2), accumulate_grad_batches=n)


def test_an_empty_batch_with_a_loss_that_is_not_finite_is_refused():
    fitted = {}
    fit(4, trainer_of(fitted), max_steps=1, accumulate_grad_batches=2)
    with pytest.raises(LoRAError, match=r"a batch of no units must have a loss of 0 .* got nan"):
        UnitMean().weigh(fitted["trainer"], torch.tensor(float("nan")), 0, 0)


def test_a_training_step_of_ones_own_is_lightnings(monkeypatch):
    def own(self, batch, batch_idx):
        out = self.task.step(self.backbone, batch)
        return out.loss * out.weight

    monkeypatch.setattr(LoRAModule, "training_step", own)
    look = Look()
    fit(2, look, accumulate_grad_batches=3, max_steps=1)
    model, batch = module(), rows(ROWS, seed=1)[:6]
    (sum(own(model, default_collate(batch[i : i + 2]), 0) for i in (0, 2, 4)) / 3).backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(look.gradients[key], p.grad, rtol=1e-12, atol=1e-16)


def test_sharded_gradients_are_multiplied_where_they_lie():
    with one_process() as mesh:
        parameter = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
        parameter.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        multiply_gradients(torch.optim.SGD([parameter]), 2.5)
        assert torch.equal(parameter.grad.full_tensor(), torch.full((4, 3), 2.5))
