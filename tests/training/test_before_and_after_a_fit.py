"""What is said before a fit that could not go well, and after one that was stopped."""

import os
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from lora_lightning import Checkpoints, FreezeBase, LoRAConfig, LoRAError, WarmupDecay
from lora_lightning.training.checkpoints.run_folder import find_checkpoint
from lora_lightning.training.trainer import LoRATrainer, logging_interval
from tests.training import ragged, resuming
from tests.training.test_module import Vision, loader, trainer_of


@pytest.mark.parametrize("precision", ["64-true", 64])
def test_fsdp2_in_64_true_is_refused_in_one_line(precision):
    with pytest.raises(LoRAError, match="is not for fsdp2: load the model itself in float64"):
        LoRATrainer(strategy="fsdp2", accelerator="cpu", devices=2, precision=precision)


def test_a_list_of_devices_on_a_cpu_is_answered_by_what_a_cpu_takes():
    with pytest.raises(LoRAError, match=r"devices \[0, 1, 2\] names GPUs .* on a CPU.*: trainer\.devices 3"):
        LoRATrainer(accelerator="cpu", devices=[0, 1, 2])


def test_more_processes_than_cores_are_warned_of():
    cores = len(os.sched_getaffinity(0))
    with pytest.warns(UserWarning, match=f"{cores + 6} processes share {cores} cores.*--trainer.devices {cores}"):
        LoRATrainer(accelerator="cpu", devices=cores + 6, logger=False)


def test_a_warm_up_longer_than_the_run_is_warned_of(tmp_path, make_module):
    module = make_module(Vision(), LoRAConfig(r=2))
    module.lr_scheduler = partial(WarmupDecay, warmup=600)
    with pytest.warns(UserWarning, match=r"the warm-up takes 600 steps and the run has \d+"):
        trainer_of(tmp_path, enable_checkpointing=False).fit(module, loader())


def test_a_small_fit_logs_at_least_fifty_rows_and_a_long_one_every_fiftieth_step(tiny, tmp_path):
    assert [logging_interval(n) for n in (1, 36, 100, 1000, 2500, 10**6, float("inf"))] == [1, 1, 2, 20, 50, 50, 50]
    trainer = resuming.fit(tiny, tmp_path, max_epochs=1, log_every_n_steps=None)
    assert trainer.log_every_n_steps == 1
    rows = (tmp_path / "run/version_0/metrics.csv").read_text().splitlines()
    assert sum("train/loss_step" in rows[0] and bool(row) for row in rows[1:]) >= trainer.global_step
    given = resuming.fit(tiny, tmp_path / "given", max_epochs=1, log_every_n_steps=3)
    assert given.log_every_n_steps == 3


class Press(Callback):
    """Ctrl-C after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("save_every", "said"), [(1, r"--ckpt_path \S+last\.ckpt goes on from step"), (None, "--save_every N")]
)
def test_ctrl_c_says_how_to_go_on(tiny, tmp_path, save_every, said):
    callbacks = [FreezeBase(show_table=False), Checkpoints(save_every=save_every), Press(2)]
    with pytest.warns(UserWarning, match=f"stopped by Ctrl-C after step 2; .*{said}"), pytest.raises(SystemExit):
        resuming.fit(tiny, tmp_path, callbacks=callbacks)


def test_a_folder_of_runs_lists_them(tmp_path):
    for number in range(20):
        folder = tmp_path / "runs" / f"run{number}" / "version_0" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save({"state_dict": {}}, folder / "last.ckpt")
        os.utime(folder, (number, number))
    with pytest.raises(LoRAError, match=r"holds 20 runs, the newest first '\S*run19', '\S*run18'.* and 12 more"):
        find_checkpoint(tmp_path / "runs")


class Masked(ragged.Ragged):
    """Each second micro-batch has nothing to train on."""

    def loader(self, data):
        for i, row in enumerate(data):
            row["labels"] = torch.full_like(row["labels"], -100) if (i // self.batch_size) % 2 else row["ids"]
        return super().loader(data)


def test_a_micro_batch_without_labels_counts_for_nothing_and_stops_nothing():
    """Law 9: two micro-batches, of which one is masked, are one step on the other."""
    masked = ragged.fit(2, data=Masked(2), accumulate_grad_batches=2, max_steps=5)
    assert masked["steps"] == 5

    class Others(Masked):
        def loader(self, data):
            kept = [row for i, row in enumerate(data) if not (i // self.batch_size) % 2]
            return ragged.Ragged.loader(self, [row | {"labels": row["ids"]} for row in kept])

    alone = ragged.fit(2, data=Others(2), max_steps=5)
    for key, value in alone["adapter"].items():
        assert torch.allclose(masked["adapter"][key], value, rtol=0, atol=1e-12), key
    assert masked["losses"] == pytest.approx(alone["losses"], rel=1e-12)
