"""Guards that stop a fit, or let it end in order: docs/guards.md lists all; tests/mutations.py takes each away once."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from lora_lightning import (
    Checkpoints,
    FreezeBase,
    LoRAConfig,
    LoRAError,
    LoRAModule,
    Resume,
    RunReport,
    StopOnNonFinite,
)
from lora_lightning.cli.main import LoRACLI
from lora_lightning.training.callbacks.nan_guard import NotFiniteError
from lora_lightning.training.checkpoints import file_io as checkpoint_io
from lora_lightning.training.checkpoints.file_io import PREVIOUS, WholeFiles, read_checkpoint, write_checkpoint
from lora_lightning.training.checkpoints.model_checkpoint import PreemptedError
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.training.resuming import fit
from tests.training.test_module import Vision, loader, trainer_of
from tests.training.test_resume import Spoils, checkpoints


def test_every_guard_is_on_by_default_in_the_command(tiny):
    cli = LoRACLI(args=["fit", "--config", tiny.config, "--trainer.fast_dev_run", "1"])
    found = [type(callback) for callback in cli.trainer.callbacks]
    for guard in (FreezeBase, Resume, StopOnNonFinite, Checkpoints, RunReport):
        assert found.count(guard) == 1, guard
    assert isinstance(cli.trainer.strategy.checkpoint_io, WholeFiles)


def test_a_guard_of_ones_own_takes_the_defaults_place(tiny):
    own = ["--trainer.callbacks+=FreezeBase", "--trainer.callbacks.proves_at=end"]
    cli = LoRACLI(args=["fit", "--config", tiny.config, "--trainer.fast_dev_run", "1", *own])
    assert [c.proves_at for c in cli.trainer.callbacks if isinstance(c, FreezeBase)] == ["end"]


def infinite_loss(module):
    """The loss alone: a number is added to it, so that each gradient is what it was."""
    step = module.task.step

    def spoiled(*args):
        out = step(*args)
        return replace(out, loss=out.loss + float("inf"))

    module.task.step = spoiled


def test_a_loss_that_is_not_finite_stops_the_fit_though_its_gradients_are(tiny, tmp_path):
    class Finite(Callback):
        """Only the loss is bad."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert all(bool(torch.isfinite(p.grad).all()) for p in pl_module.parameters() if p.grad is not None)

    given = [FreezeBase(False), Resume(), Finite(), Spoils(infinite_loss), StopOnNonFinite(), Checkpoints(save_every=1)]
    with pytest.raises(NotFiniteError, match="loss of optimizer step 8 is not finite: epoch 1, batch 1; rows"):
        fit(tiny, tmp_path, callbacks=given)
    assert load_checkpoint(checkpoints(tmp_path) / "last.ckpt")["global_step"] == 7


def test_before_there_is_a_checkpoint_none_is_called_good(tiny, tmp_path):
    class First(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            infinite_loss(pl_module)

    given = [FreezeBase(False), First(), StopOnNonFinite(), Checkpoints(save_every=1)]
    with pytest.raises(
        NotFiniteError, match=r"optimizer step 1 .* and nothing is saved yet: lower the learning"
    ) as said:
        fit(tiny, tmp_path, callbacks=given)
    assert "is good" not in str(said.value)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_of_accumulated_batches_the_bad_one_is_named(tiny, tmp_path):
    class Second(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                infinite_loss(pl_module)
            elif batch_idx == 2:
                del pl_module.task.step

    with pytest.raises(NotFiniteError, match=r"loss of optimizer step 1 is not finite: epoch 0, batch 1; rows"):
        fit(tiny, tmp_path, callbacks=[Second(), StopOnNonFinite()], accumulate_grad_batches=3, max_steps=1)


def test_with_a_loss_scaler_gradients_may_overflow_and_the_loss_may_not(tmp_path, make_module):
    class Overflow(Callback):
        def on_after_backward(self, trainer, pl_module):
            pl_module.backbone.body[4].lora_B.grad.fill_(float("inf"))

    def run(*callbacks):
        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
        options = {"plugins": [scaler], "enable_checkpointing": False, "callbacks": [*callbacks, StopOnNonFinite()]}
        trainer = trainer_of(tmp_path, **options)
        trainer.fit(module := make_module(Vision(), LoRAConfig(r=2)), loader())
        return module, scaler.scaler.get_scale()

    module, scale = run(Overflow())
    assert scale < 2.0**8, "steps were skipped"
    assert not module.backbone.body[4].lora_B.any()

    class Spoil(Callback):
        def on_train_start(self, trainer, pl_module):
            infinite_loss(pl_module)

    with pytest.raises(NotFiniteError, match="the loss of optimizer step 1 is not finite"):
        run(Spoil())


def test_an_optimizer_of_everything_stops_the_fit_before_its_first_step(tmp_path, make_module):
    class Everything(LoRAModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Steps(Callback):
        def on_train_batch_start(self, *args):
            raise AssertionError("it trained")

    module = make_module(Vision(), LoRAConfig(r=2))
    module.__class__ = Everything
    with pytest.raises(LoRAError, match=r"holds 8 frozen parameters, first 'backbone\.body\.0\.weight'"):
        trainer_of(tmp_path, callbacks=[FreezeBase(False), Steps()], enable_checkpointing=False).fit(module, loader())


def test_sigterm_saves_after_the_step_and_ends_with_the_code_that_asks_for_more(tiny, tmp_path):
    class Term(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(PreemptedError) as stopped,
        pytest.warns(UserWarning, match=r"SIGTERM: all is saved in .*after step 4.*--ckpt_path last"),
    ):
        fit(tiny, tmp_path, callbacks=[FreezeBase(False), Resume(), Term(), Checkpoints()])
    assert stopped.value.code == 75
    assert load_checkpoint(checkpoints(tmp_path) / "last.ckpt")["global_step"] == 4
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_metric_than_the_checkpoints_begins_its_own_best(tiny, tmp_path):
    """A best accuracy of 0.9 is no loss to fall below."""

    def watch(name, mode):
        return [FreezeBase(False), Resume(), Checkpoints(monitor=name, mode=mode)]

    fit(tiny, tmp_path, callbacks=watch("val/loss", "min"), max_epochs=1)
    last = checkpoints(tmp_path) / "last.ckpt"
    with pytest.warns(UserWarning, match="best so far was by val/loss.*begins anew with val/accuracy"):
        on = fit(tiny, tmp_path, ckpt=last, callbacks=watch("val/accuracy", "max"), max_epochs=2)
    best = load_checkpoint(on.checkpoint_callback.best_model_path)
    assert best["global_step"] == 12
    assert float(on.checkpoint_callback.best_model_score) == float(on.callback_metrics["val/accuracy"])


def test_a_file_is_synced_before_it_is_moved_and_the_move_after_it(tmp_path, monkeypatch):
    file, done = tmp_path / "last.ckpt", []
    write_checkpoint({"state_dict": {"a": torch.ones(3)}}, file)
    move, fsync = Path.replace, os.fsync

    def note_sync(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        done.append("sync the folder" if path.is_dir() else "sync the file")
        if done[-1] == "sync the file":
            assert checkpoint_io.check_whole(path) is None, "all of it was written before"
        fsync(handle)

    def note_move(self, target):
        done.append(f"move to {target.name}")
        return move(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_move)
    write_checkpoint({"state_dict": {"a": torch.zeros(3)}}, file)
    assert done == ["sync the file", f"move to last.ckpt{PREVIOUS}", "move to last.ckpt", "sync the folder"]


def test_a_checkpoint_made_on_a_gpu_is_read_on_a_machine_without_one(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    write_checkpoint({"state_dict": {"a": torch.ones(3)}}, file)
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA device"):
            torch.load(file, weights_only=True)
    for found in (read_checkpoint(file), WholeFiles().load_checkpoint(file), load_checkpoint(file)):
        assert found["state_dict"]["a"].device.type == "cpu"
        assert torch.equal(found["state_dict"]["a"], torch.ones(3))
