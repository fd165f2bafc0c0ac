"""Guards that stop a fit, or let it end in order: docs/guards.md lists all; tests/mutations.py takes each away once."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lora_lightning import (
    CausalLM,
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
from lora_lightning.training.callbacks.guards import NotFiniteError, W0MovedError, check_gradients, check_optimizers
from lora_lightning.training.checkpoints import file_io as checkpoint_io
from lora_lightning.training.checkpoints.file_io import PREVIOUS, WholeFiles, read_checkpoint, write_checkpoint
from lora_lightning.training.checkpoints.model_checkpoint import PreemptedError
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.faults import Fault
from tests.tiny_lm import make_model
from tests.training import resuming
from tests.training.resuming import checkpoints
from tests.training.small import Vision, fit


def test_every_guard_is_on_by_default_in_the_command(tiny):
    once = ["fit", "--config", tiny.config, "--trainer.fast_dev_run", "1"]
    cli = LoRACLI(args=once)
    found = [type(callback) for callback in cli.trainer.callbacks]
    for guard in (FreezeBase, Resume, StopOnNonFinite, Checkpoints, RunReport):
        assert found.count(guard) == 1, guard
    assert isinstance(cli.trainer.strategy.checkpoint_io, WholeFiles)
    cli = LoRACLI(args=[*once, "--trainer.callbacks+=FreezeBase", "--trainer.callbacks.proves_at=end"])
    assert [c.proves_at for c in cli.trainer.callbacks if isinstance(c, FreezeBase)] == ["end"]


class Before(Callback):
    """Calls `act` with the module before each batch, or before the one that follows `step` optimizer steps."""

    def __init__(self, act, step=None):
        self.act, self.step = act, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.step is None or trainer.global_step == self.step:
            self.act(pl_module)


def small(make_module, backbone=None):
    return make_module(backbone or Vision(), LoRAConfig(r=2))


# Law 2.


@pytest.mark.parametrize("name", ["body.4.bias", "body.1.running_mean"])
def test_a_moved_w0_stops_the_fit(tmp_path, make_module, name):
    def nudge(module):
        first = module.backbone.state_dict()[name][:1]
        first += 1e-7 + first.abs() * 1e-6

    with pytest.raises(W0MovedError, match=rf"frozen tensors changed, first '{name}'"):
        fit(tmp_path, small(make_module), Before(nudge))


def test_batch_statistics_hold_though_someone_wakes_the_norm(tmp_path, make_module):
    fit(tmp_path, small(make_module), Before(lambda module: module.backbone.body[1].train()))


def test_a_parameter_that_someone_thaws_is_frozen_again(tmp_path, make_module):
    module = small(make_module)
    module.backbone.body[4].weight.requires_grad_(True)
    before = module.backbone.body[4].weight.clone()
    fit(tmp_path, module)
    assert torch.equal(before, module.backbone.body[4].weight)


@pytest.mark.parametrize(("proves_at", "kept"), [("checkpoint", 7), ("best", 11)])
def test_no_checkpoint_is_written_over_a_good_one_once_w0_has_moved(tiny, tmp_path, proves_at, kept):
    class Rises(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("rises", float(trainer.current_epoch))

    watch = Checkpoints(save_every=1, monitor="rises", mode="max")
    given = [FreezeBase(False, proves_at), Resume(), Rises(), Fault("w0:0:7"), watch]
    with pytest.raises(W0MovedError, match="word_embeddings"):
        resuming.fit(tiny, tmp_path, callbacks=given)
    assert load_checkpoint(checkpoints(tmp_path) / "last.ckpt")["global_step"] == kept
    assert load_checkpoint(checkpoints(tmp_path) / "best.ckpt")["global_step"] == 6


# Laws 4 and 10.


def test_an_adapter_that_the_forward_bypasses_stops_the_run(tmp_path, make_module):
    class Reads(Vision):
        """Reads a weight instead of calling its module, as fused kernels do."""

        def forward(self, x):
            first = self.body[0]
            return self.head(self.body[4](torch.relu(nn.functional.linear(x, first.weight, first.bias))))

    with pytest.raises(LoRAError, match=r"2 of 4 trainable tensors got no gradient.*body\.0\.lora_A"):
        fit(tmp_path, small(make_module, Reads()))


def test_a_gradient_that_is_not_finite_stops_the_run_but_for_a_loss_scalers_first_step(tmp_path, make_module):
    class Infinite(Vision):
        def forward(self, x):
            return super().forward(x) * torch.tensor(float("inf"))

    with pytest.raises(LoRAError, match="not finite"):
        fit(tmp_path, module := small(make_module, Infinite()))
    check_gradients(module, finite=False)


LOST = {"lm_head": {"target_modules": ["q_proj", "lm_head"]}}
LOST |= {"model.embed_tokens": {"trainable_token_indices": [1, 2]}}


@pytest.mark.parametrize("lost", LOST)
def test_an_adapter_that_a_later_change_of_the_model_lost_stops_the_fit(tmp_path, lost):
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    module = LoRAModule(make_model("llama"), CausalLM(), LoRAConfig(r=2, **LOST[lost]))
    fit(tmp_path, module, data=torch.utils.data.DataLoader(rows, batch_size=2), max_steps=1)
    with pytest.raises(LoRAError, match="resize the plain model"):
        module.backbone.resize_token_embeddings(64)
    type(module.backbone).resize_token_embeddings(module.backbone, module.backbone.config.vocab_size + 8)
    with pytest.raises(LoRAError, match=f"'{lost}' is gone"):
        fit(tmp_path, module, data=torch.utils.data.DataLoader(rows, batch_size=2), max_steps=1)


def test_an_optimizer_that_holds_too_much_or_too_little_is_refused_before_the_first_step(tmp_path, make_module):
    module = small(make_module)
    trains = [p for p in module.parameters() if p.requires_grad]
    with pytest.raises(LoRAError, match="lacks 3 parameters"):
        check_optimizers([torch.optim.SGD(trains[:1], lr=1)], module)
    check_optimizers([torch.optim.SGD(trains, lr=1)], module)

    def fail(module):
        raise AssertionError("it trained")

    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(LoRAError, match=r"holds 8 frozen parameters, first 'backbone\.body\.0\.weight'"):
        fit(tmp_path, module, Before(fail))


# What is not finite.


TWENTY_ROWS = r"rows (\d+, ){19}\d+ of the training set"
SPOILED = {
    "loss": "loss of optimizer step 8 is not finite: epoch 1, batch 1; rows",
    "nan": rf"loss of optimizer step 8 .*: epoch 1, batch 1; {TWENTY_ROWS}.*layer\.1\.output",
    "overflow": r"gradient of optimizer step 8.*layer\.0\.attention\.self\.query\.lora_B",
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_not_finite_stops_the_fit_by_name_and_leaves_the_last_good_checkpoint(tiny, tmp_path, what):
    """The step, the rows and the first bad layer or tensor, before the optimizer has moved anything."""
    given = [FreezeBase(False), Resume(), Fault(f"{what}:0:7"), StopOnNonFinite(), Checkpoints(save_every=1)]
    with pytest.raises(NotFiniteError, match=f"(?s){SPOILED[what]}"):
        resuming.fit(tiny, tmp_path, callbacks=given)
    good = load_checkpoint(checkpoints(tmp_path) / "last.ckpt")
    assert good["global_step"] == 7
    assert all(bool(torch.isfinite(t).all()) for t in good["state_dict"].values())


def test_before_there_is_a_checkpoint_none_is_called_good(tiny, tmp_path):
    given = [FreezeBase(False), Fault("loss:0:0"), StopOnNonFinite(), Checkpoints(save_every=1)]
    words = r"optimizer step 1 .* and nothing is saved yet: lower the learning"
    with pytest.raises(NotFiniteError, match=words) as said:
        resuming.fit(tiny, tmp_path, callbacks=given)
    assert "is good" not in str(said.value)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_of_accumulated_batches_the_bad_one_is_named(tiny, tmp_path):
    class Second(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                Fault().loss(trainer, pl_module)
            elif batch_idx == 2:
                del pl_module.task.step

    with pytest.raises(NotFiniteError, match=r"loss of optimizer step 1 is not finite: epoch 0, batch 1; rows"):
        resuming.fit(tiny, tmp_path, callbacks=[Second(), StopOnNonFinite()], accumulate_grad_batches=3, max_steps=1)


def test_with_a_loss_scaler_gradients_may_overflow_and_the_loss_may_not(tmp_path, make_module):
    class Overflow(Callback):
        def on_after_backward(self, trainer, pl_module):
            pl_module.backbone.body[4].lora_B.grad.fill_(float("inf"))

    def run(module, callback):
        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
        fit(tmp_path, module, callback, StopOnNonFinite(), plugins=[scaler])
        return scaler.scaler.get_scale()

    module = small(make_module)
    assert run(module, Overflow()) < 2.0**8, "steps were skipped"
    assert not module.backbone.body[4].lora_B.any()
    with pytest.raises(NotFiniteError, match="the loss of optimizer step 1 is not finite"):
        run(small(make_module), Fault("loss:0:0"))


# Signals, and what a checkpoint says.


def test_sigterm_saves_after_the_step_and_ends_with_the_code_that_asks_for_more(tiny, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(PreemptedError) as stopped,
        pytest.warns(UserWarning, match=r"SIGTERM: all is saved in .*after step 4.*--ckpt_path last"),
    ):
        resuming.fit(tiny, tmp_path, callbacks=[FreezeBase(False), Resume(), Fault("term:0:3"), Checkpoints()])
    assert stopped.value.code == 75
    assert load_checkpoint(checkpoints(tmp_path) / "last.ckpt")["global_step"] == 4
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("save_every", "said"), [(1, r"--ckpt_path \S+last\.ckpt goes on from step"), (None, "--save_every N")]
)
def test_ctrl_c_says_how_to_go_on(tiny, tmp_path, save_every, said):
    def interrupt(module):
        raise KeyboardInterrupt

    callbacks = [FreezeBase(show_table=False), Checkpoints(save_every=save_every), Before(interrupt, 2)]
    with pytest.warns(UserWarning, match=f"stopped by Ctrl-C after step 2; .*{said}"), pytest.raises(SystemExit):
        resuming.fit(tiny, tmp_path, callbacks=callbacks)


def test_another_metric_than_the_checkpoints_begins_its_own_best(tiny, tmp_path):
    """A best accuracy of 0.9 is no loss to fall below."""

    def watch(name, mode):
        return [FreezeBase(False), Resume(), Checkpoints(monitor=name, mode=mode)]

    resuming.fit(tiny, tmp_path, callbacks=watch("val/loss", "min"), max_epochs=1)
    last = checkpoints(tmp_path) / "last.ckpt"
    with pytest.warns(UserWarning, match="best so far was by val/loss.*begins anew with val/accuracy"):
        on = resuming.fit(tiny, tmp_path, ckpt=last, callbacks=watch("val/accuracy", "max"), max_epochs=2)
    assert load_checkpoint(on.checkpoint_callback.best_model_path)["global_step"] == 12
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
    for found in (read_checkpoint(file), WholeFiles().load_checkpoint(file), load_checkpoint(file)):
        assert torch.equal(found["state_dict"]["a"], torch.ones(3))
