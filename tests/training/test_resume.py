"""Law 8: a fit that goes on from any of its checkpoints ends with the bytes of the one that was not interrupted.

`tests/mutations.py` takes each part of that away once.
"""

import csv
import shutil

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lora_lightning import Checkpoints, FreezeBase, LoRAError, Resume, StopOnNonFinite
from lora_lightning.data.dataset import DatasetData
from lora_lightning.training.callbacks.freeze_base import W0MovedError
from lora_lightning.training.callbacks.nan_guard import NotFiniteError
from lora_lightning.training.checkpoints.rng_state import random_state, set_random_state
from lora_lightning.training.checkpoints.run_folder import continued_version, find_checkpoint, load_checkpoint
from tests.training import ragged, sharded
from tests.training.resuming import EveryState, differing, ended, fit

CASES = {
    "plain": ({}, [2, 6, 9, 18]),
    "accumulation": ({"accumulate_grad_batches": 4}, [1, 4]),
    "validation in mid-epoch": ({"val_check_interval": 2}, [2, 3]),
    "plateau": ({"plateau": True}, [4, 12]),
    "fewer batches than there are": ({"limit_train_batches": 4}, [4, 7]),
    "no validation": ({"limit_val_batches": 0}, [6, 14]),
    "validation every other epoch": ({"check_val_every_n_epoch": 2}, [6, 13]),
    "max_steps": ({"max_epochs": -1, "max_steps": 9}, [5, 6]),
}


def checkpoints(folder):
    return folder / "run" / "version_0" / "checkpoints"


def rows(folder):
    with (folder / "run" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def check(tiny, folder, settings, steps):
    first = fit(tiny, folder / "whole", **settings)
    for step in steps:
        shutil.copytree(folder / "whole", folder / f"{step}")
        (file,) = checkpoints(folder / f"{step}").glob(f"{step:03}-*.ckpt")
        resumed = fit(tiny, folder / f"{step}", ckpt=file, **settings)
        assert differing(ended(first), ended(resumed)) == [], file.name
        assert rows(folder / f"{step}") == rows(folder / "whole"), file.name


@pytest.mark.parametrize("case", CASES)
def test_resumed_from_any_state_is_uninterrupted(tiny, tmp_path, case):
    settings, steps = CASES[case]
    check(tiny, tmp_path, settings, steps[-2:])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resumed_from_each_state_is_uninterrupted(tiny, tmp_path, case):
    settings, _ = CASES[case]
    steps = {"accumulation": 6, "max_steps": 8, "fewer batches than there are": 12}.get(case, 18)
    check(tiny, tmp_path, settings, range(1, steps + 1))


@pytest.mark.slow
def test_resumed_with_workers_is_uninterrupted(tiny, tmp_path):
    check(tiny, tmp_path, {"data": {"num_workers": 2}}, [3, 6, 11])


@pytest.mark.slow
def test_resumed_in_two_processes_is_uninterrupted(tiny, tmp_path):
    settings = {"devices": 2, "strategy": "ddp_fork", "data": {"batch_size": 10}}
    fit(tiny, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "on")
    want = load_checkpoint(checkpoints(tmp_path / "whole") / "last.ckpt")
    for step in ("003-batch", "006-epoch"):
        fit(tiny, tmp_path / "on", ckpt=checkpoints(tmp_path / "on") / f"{step}.ckpt", **settings)
        got = load_checkpoint(checkpoints(tmp_path / "on") / "last.ckpt")
        assert got["global_step"] == want["global_step"] == 18
        assert differing(want["state_dict"], got["state_dict"]) == []
        for i, state in want["optimizer_states"][0]["state"].items():
            assert differing(state, got["optimizer_states"][0]["state"][i]) == []
        for one, other in zip(
            want["lora_lightning_resume"]["processes"], got["lora_lightning_resume"]["processes"], strict=True
        ):
            assert torch.equal(one["random"]["torch"], other["random"]["torch"])


class Falls(Callback):
    """The end of the first epoch is the best."""

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
    assert rows(tmp_path / "on") == rows(tmp_path / "whole")


def test_last_is_the_newest_state_and_best_the_best(tiny, tmp_path):
    fit(tiny, tmp_path, callbacks=best_of_the_first_epoch())
    steps = {n: load_checkpoint(checkpoints(tmp_path) / f"{n}.ckpt")["global_step"] for n in ("best", "last")}
    assert steps == {"best": 6, "last": 18}
    # Into another folder: the best so far is taken along, and a worse one does not replace it.
    given = best_of_the_first_epoch()
    more = fit(
        tiny, tmp_path / "more", ckpt=checkpoints(tmp_path) / "last.ckpt", callbacks=given, max_epochs=4, logger=False,
        default_root_dir=tmp_path / "more",
    )  # fmt: skip
    assert float(more.checkpoint_callback.best_model_score) == 0.0
    assert load_checkpoint(tmp_path / "more" / "checkpoints" / "best.ckpt")["global_step"] == 6
    assert load_checkpoint(tmp_path / "more" / "checkpoints" / "last.ckpt")["global_step"] == 24


def test_a_fit_goes_on_in_its_own_folder_from_its_newest_state_only(trained):
    runs = trained.parent
    assert continued_version(find_checkpoint(trained, "last"), runs) == 0
    assert continued_version(find_checkpoint(trained, "best"), runs) is None
    assert continued_version(find_checkpoint(trained, "last"), runs.parent / "other") is None


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
    content["lora_lightning_resume"]["processes"] *= 2
    torch.save(content, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="written by 2 processes and is read by 1"):
        fit(tiny, tmp_path / "two", ckpt=tmp_path / "two.ckpt", max_epochs=1)
    del content["lora_lightning_resume"]
    torch.save(content, tmp_path / "none.ckpt")
    with pytest.warns(UserWarning, match="holds no random states"):
        fit(tiny, tmp_path / "none", ckpt=tmp_path / "none.ckpt", max_epochs=1)


def test_rows_after_the_checkpoint_are_forgotten_though_no_step_makes_them_anew(tiny, tmp_path):
    """A fit that goes on from step 3 of 18 and ends at step 5."""
    fit(tiny, tmp_path)
    fit(tiny, tmp_path, ckpt=checkpoints(tmp_path) / "003-batch.ckpt", max_steps=5)
    assert max(int(row["step"]) for row in rows(tmp_path)) == 4


def test_an_epoch_that_accumulates_by_a_schedule_resumes_in_its_middle(tiny, tmp_path):
    """Lightning leaves out the hook in which its scheduler says over how many batches."""

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


def fit_rows(folder, data, ckpt=None, **options):
    if ckpt is not None:
        torch.rand(7)
    given = [FreezeBase(False), Resume(), EveryState(save_every=1)]
    torch.manual_seed(5)
    made = sharded.module(torch.float32, dropout=0.2)
    trainer = sharded.trainer_of(*given, folder=folder, **{"max_epochs": 2, "num_sanity_val_steps": 0} | options)
    trainer.fit(made, data, ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize("train", [Rows, Stream])
def test_a_set_of_ones_own_resumes_in_an_epochs_middle(tmp_path, train):
    def data():
        return DatasetData(train=train(), validation=Rows(), batch_size=4)

    whole = fit_rows(tmp_path / "whole", data())
    for state in ("003-batch", "006-epoch", "010-batch"):
        file = checkpoints(tmp_path / "whole") / f"{state}.ckpt"
        assert differing(ended(whole), ended(fit_rows(tmp_path / state, data(), str(file)))) == [], state


@pytest.mark.parametrize(("loader", "options"), [("DataLoader", {}), ("ResumableLoader", {"overfit_batches": 3})])
def test_rows_that_come_again_in_an_epochs_middle_are_said(tmp_path, loader, options):
    def data():
        return DatasetData(train=Rows(), batch_size=4) if options else Own()

    given = options | {"max_epochs": 1, "limit_val_batches": 0}
    fit_rows(tmp_path / "whole", data(), **given)
    file = checkpoints(tmp_path / "whole") / "002-batch.ckpt"
    with pytest.warns(UserWarning, match=f"middle of an epoch, whose rows {loader} begins anew.*not bit for bit"):
        fit_rows(tmp_path / "on", data(), str(file), **given)


def test_what_a_checkpoint_overrules_is_said(tiny, tmp_path, caplog):
    fit(tiny, tmp_path, max_epochs=1)
    content = load_checkpoint(checkpoints(tmp_path) / "003-batch.ckpt")
    content["lora_lightning_resume"]["settings"]["lr of B"] = 0.5
    torch.save(content, tmp_path / "other.ckpt")
    with caplog.at_level("INFO"):
        fit(tiny, tmp_path / "on", ckpt=tmp_path / "other.ckpt", max_epochs=1)
    assert "the checkpoint's lr of B 0.5 wins over this run's 0.01" in caplog.text


def test_random_states_come_back():
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))

    draw()
    state = random_state()
    first = draw()
    draw()
    set_random_state(state)
    assert draw() == first


class Spoils(Callback):
    """Makes something not finite in the eighth step."""

    def __init__(self, spoil):
        self.spoil = spoil

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 7:
            self.spoil(pl_module)


def nan_in_a_layer(module):
    layer = module.backbone.bert.encoder.layer[1].output.dense
    layer.register_forward_hook(lambda _, __, out: out * float("nan"))


def nan_in_a_gradient(module):
    name = "bert.encoder.layer.0.attention.self.query"
    module.backbone.get_submodule(name).lora_B.register_hook(lambda grad: grad * float("inf"))


def test_a_bad_loss_stops_with_the_step_the_rows_and_the_layer_and_leaves_the_last_good_checkpoint(tiny, tmp_path):
    given = [FreezeBase(False), Resume(), Spoils(nan_in_a_layer), StopOnNonFinite(), Checkpoints(save_every=1)]
    message = (
        r"loss of optimizer step 8 is not finite: epoch 1, batch 1; rows \d+.* of the training set.*layer.1.output"
    )
    with pytest.raises(NotFiniteError, match=message) as stopped:
        fit(tiny, tmp_path, callbacks=given)
    good = load_checkpoint(checkpoints(tmp_path) / "last.ckpt")
    assert good["global_step"] == 7
    assert all(bool(torch.isfinite(t).all()) for t in good["state_dict"].values())
    rows_told = str(stopped.value).split("rows ")[1].split(" of ")[0].split(", ")
    assert len(rows_told) == 20


def test_a_bad_gradient_stops_before_the_optimizer_and_names_the_tensor(tiny, tmp_path):
    given = [FreezeBase(False), Resume(), Spoils(nan_in_a_gradient), StopOnNonFinite(), Checkpoints(save_every=1)]
    with pytest.raises(
        NotFiniteError, match=r"gradient of optimizer step 8 .*layer\.0\.attention\.self\.query\.lora_B"
    ):
        fit(tiny, tmp_path, callbacks=given)
    assert load_checkpoint(checkpoints(tmp_path) / "last.ckpt")["global_step"] == 7


@pytest.mark.parametrize(("proves_at", "kept"), [("checkpoint", 7), ("best", 11)])
def test_no_checkpoint_is_written_over_a_good_one_once_w0_has_moved(tiny, tmp_path, proves_at, kept):
    def move(module):
        module.backbone.bert.embeddings.word_embeddings.weight.data[0, 0] += 1

    class Rises(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("rises", float(trainer.current_epoch))

    watch = Checkpoints(save_every=1, monitor="rises", mode="max")
    with pytest.raises(W0MovedError, match="word_embeddings"):
        fit(tiny, tmp_path, callbacks=[FreezeBase(False, proves_at), Resume(), Rises(), Spoils(move), watch])
    assert load_checkpoint(checkpoints(tmp_path) / "last.ckpt")["global_step"] == kept
    assert load_checkpoint(checkpoints(tmp_path) / "best.ckpt")["global_step"] == 6
