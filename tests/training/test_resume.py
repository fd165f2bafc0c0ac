"""Law 8: a fit that goes on from any of its checkpoints ends with the bytes of the one that was not interrupted."""

import random
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lora_lightning import Checkpoints, FreezeBase, LoRAError, Resume
from lora_lightning.data.dataset import DatasetData
from lora_lightning.training.checkpoints.resume import random_state, set_random_state
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.training import ragged, strategies
from tests.training.resuming import EveryState, at, checkpoints, differing, ended, fit, logged

CASES = {
    "plain": ({}, [2, 6, 9, 18]),
    "accumulation": ({"accumulate_grad_batches": 4}, [1, 4]),
    "validation in mid-epoch": ({"val_check_interval": 2}, [2, 3]),
    "validation mid-step": ({"val_check_interval": 3, "accumulate_grad_batches": 2}, [1, 4]),
    "plateau": ({"plateau": True}, [4, 12]),
    "fewer batches than there are": ({"limit_train_batches": 4}, [4, 7]),
    "no validation": ({"limit_val_batches": 0}, [6, 14]),
    "validation every other epoch": ({"check_val_every_n_epoch": 2}, [6, 13]),
    "max_steps": ({"max_epochs": -1, "max_steps": 9}, [5, 6]),
}


def check(tiny, folder, settings, steps):
    first = fit(tiny, folder / "whole", **settings)
    for step in steps:
        shutil.copytree(folder / "whole", folder / f"{step}")
        file = at(folder / f"{step}", step)
        resumed = fit(tiny, folder / f"{step}", ckpt=file, **settings)
        assert differing(ended(first), ended(resumed)) == [], file.name
        assert logged(folder / f"{step}") == logged(folder / "whole"), file.name


@pytest.mark.parametrize("case", CASES)
def test_resumed_from_any_state_is_uninterrupted(tiny, tmp_path, case):
    check(tiny, tmp_path, CASES[case][0], CASES[case][1][-2:])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resumed_from_each_state_is_uninterrupted(tiny, tmp_path, case):
    lengths = {"accumulation": 6, "max_steps": 8, "validation mid-step": 9, "fewer batches than there are": 12}
    check(tiny, tmp_path, CASES[case][0], range(1, lengths.get(case, 18) + 1))


@pytest.mark.slow
def test_resumed_with_workers_is_uninterrupted(tiny, tmp_path):
    check(tiny, tmp_path, {"data": {"num_workers": 2}}, [3, 6, 11])


class Falls(Callback):  # the end of the first epoch is the best
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("falls", -abs(trainer.global_step - 6.0))


def best_of_the_first_epoch():
    return [FreezeBase(show_table=False), Resume(), Falls(), Checkpoints(monitor="falls", mode="max")]


@pytest.mark.parametrize("settings", [{"plateau": True}, {"val_check_interval": 2}], ids=["plateau", "mid-epoch"])
def test_best_resumes_from_an_epochs_end_with_the_plateau_that_was_due(tiny, tmp_path, settings):
    whole = fit(tiny, tmp_path / "whole", callbacks=best_of_the_first_epoch(), **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "on")
    best = checkpoints(tmp_path / "on") / "best.ckpt"
    assert load_checkpoint(best)["global_step"] == 6
    resumed = fit(tiny, tmp_path / "on", ckpt=best, callbacks=best_of_the_first_epoch(), **settings)
    assert differing(ended(whole), ended(resumed)) == []
    assert logged(tmp_path / "on") == logged(tmp_path / "whole")


def test_last_is_the_newest_state_and_best_the_best(tiny, tmp_path):
    fit(tiny, tmp_path, callbacks=best_of_the_first_epoch())
    steps = {n: load_checkpoint(checkpoints(tmp_path) / f"{n}.ckpt")["global_step"] for n in ("best", "last")}
    assert steps == {"best": 6, "last": 18}
    # Into another folder: the best so far is taken along, and a worse one does not replace it.
    given = {"callbacks": best_of_the_first_epoch(), "logger": False, "default_root_dir": tmp_path / "more"}
    more = fit(tiny, tmp_path / "more", ckpt=checkpoints(tmp_path) / "last.ckpt", max_epochs=4, **given)
    assert float(more.checkpoint_callback.best_model_score) == 0.0
    assert load_checkpoint(tmp_path / "more" / "checkpoints" / "best.ckpt")["global_step"] == 6
    assert load_checkpoint(tmp_path / "more" / "checkpoints" / "last.ckpt")["global_step"] == 24


def test_another_order_is_refused_in_an_epochs_middle(tiny, tmp_path):
    fit(tiny, tmp_path, max_epochs=1)
    middle, end = (checkpoints(tmp_path) / f"{n}.ckpt" for n in ("003-batch", "006-epoch"))
    with pytest.raises(LoRAError, match=r"middle of an epoch.*seed was 0 and is 5.*epoch's end"):
        fit(tiny, tmp_path / "on", ckpt=middle, data={"seed": 5})
    fit(tiny, tmp_path / "end", ckpt=end, data={"seed": 5}, max_epochs=2)


def test_a_checkpoint_without_random_states_and_one_of_other_processes_are_named(tiny, tmp_path):
    fit(tiny, tmp_path, max_epochs=1)
    file = checkpoints(tmp_path) / "003-batch.ckpt"
    content = load_checkpoint(file)
    with pytest.warns(UserWarning, match="this fit has no callback Resume"):
        fit(tiny, tmp_path / "less", ckpt=file, max_epochs=1, callbacks=[FreezeBase(False)])
    content["lora_lightning_resume"]["processes"] *= 2
    torch.save(content, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="written by 2 processes and is read by 1"):
        fit(tiny, tmp_path / "two", ckpt=tmp_path / "two.ckpt", max_epochs=1)
    del content["lora_lightning_resume"]
    torch.save(content, tmp_path / "none.ckpt")
    with pytest.warns(UserWarning, match="holds no random states"):
        fit(tiny, tmp_path / "none", ckpt=tmp_path / "none.ckpt", max_epochs=1)


def test_rows_after_the_checkpoint_are_forgotten_though_no_step_makes_them_anew(tiny, tmp_path):
    fit(tiny, tmp_path, max_epochs=1)
    fit(tiny, tmp_path, ckpt=checkpoints(tmp_path) / "003-batch.ckpt", max_steps=5)
    assert max(int(row["step"]) for row in logged(tmp_path)) == 4


def test_an_epoch_that_accumulates_by_a_schedule_resumes_in_its_middle(tiny, tmp_path):
    def kept():
        return [FreezeBase(False), Resume(), EveryState(save_every=1), GradientAccumulationScheduler({0: 2, 1: 3})]

    whole = fit(tiny, tmp_path / "whole", callbacks=kept(), max_epochs=2)
    assert whole.global_step == 5
    for name in ("002-batch", "004-batch"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        file = checkpoints(tmp_path / name) / f"{name}.ckpt"
        resumed = fit(tiny, tmp_path / name, ckpt=file, callbacks=kept(), max_epochs=2)
        assert differing(ended(whole), ended(resumed)) == []


class Rows(Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, index):
        return ragged.rows(23, seed=1)[index]


class Stream(IterableDataset):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(ragged.rows(23, seed=1 + self.epoch))


class Own(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Stream(), batch_size=4)


@pytest.mark.parametrize("train", [Rows, Stream])
def test_a_set_of_ones_own_resumes_in_an_epochs_middle(tmp_path, train):
    def data():
        return DatasetData(train=train(), validation=Rows(), batch_size=4)

    whole = strategies.fit(tmp_path / "whole", data=data(), max_epochs=2)
    for state in ("003-batch", "006-epoch", "010-batch"):
        file = checkpoints(tmp_path / "whole") / f"{state}.ckpt"
        resumed = strategies.fit(tmp_path / state, data=data(), ckpt=file, max_epochs=2)
        assert differing(ended(whole), ended(resumed)) == [], state


@pytest.mark.parametrize(("loader", "options"), [("DataLoader", {}), ("ResumableLoader", {"overfit_batches": 3})])
def test_rows_that_come_again_in_an_epochs_middle_are_said(tmp_path, loader, options):
    def data():
        return DatasetData(train=Rows(), batch_size=4) if options else Own()

    given = options | {"max_epochs": 1, "limit_val_batches": 0}
    strategies.fit(tmp_path / "whole", data=data(), **given)
    file = checkpoints(tmp_path / "whole") / "002-batch.ckpt"
    with pytest.warns(UserWarning, match=f"middle of an epoch, whose rows {loader} begins anew.*not bit for bit"):
        strategies.fit(tmp_path / "on", data=data(), ckpt=file, **given)


def test_what_a_checkpoint_overrules_is_said(tiny, tmp_path, caplog):
    fit(tiny, tmp_path, max_epochs=1)
    content = load_checkpoint(checkpoints(tmp_path) / "003-batch.ckpt")
    content["lora_lightning_resume"]["settings"]["lr of B"] = 0.5
    torch.save(content, tmp_path / "other.ckpt")
    with caplog.at_level("INFO"):
        fit(tiny, tmp_path / "on", ckpt=tmp_path / "other.ckpt", max_epochs=1)
    assert "the checkpoint's lr of B 0.5 wins over this run's 0.01" in caplog.text


def test_random_states_come_back():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))

    draw()
    state = random_state()
    first = draw()
    draw()
    set_random_state(state)
    assert draw() == first
