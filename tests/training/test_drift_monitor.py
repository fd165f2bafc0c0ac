"""`DriftMonitor`: what it logs is what `analyze --drift` measures, and training is what it is without."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from lora_lightning import DriftMonitor, FreezeBase, LoRAError, Resume
from lora_lightning.analysis.drift import measure_drift
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.training.checkpoints import run_folder as run
from tests.training.resuming import fit


@pytest.fixture(scope="module")
def fits(tiny, tmp_path_factory):
    """The same fit with a look at every second step, and without."""
    folder, look = tmp_path_factory.mktemp("fits"), DriftMonitor(every_n_steps=2, count=12)
    watched = fit(tiny, folder / "with", callbacks=[look, FreezeBase(show_table=False), Resume()])
    return watched, fit(tiny, folder / "without"), look


def test_looking_changes_nothing_of_the_training(fits):
    with_it, without, _ = fits
    one, two = (adapter_tensors(trainer.lightning_module.backbone) for trainer in (with_it, without))
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_each_look_is_in_the_log_and_the_last_is_what_is_measured(fits):
    trainer, _, look = fits
    with (run.run_dir(trainer) / "metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row.get("drift/cosine")]
    assert [int(row["step"]) + 1 for row in logged] == list(range(2, trainer.global_step + 1, 2))
    assert {name for name in logged[-1] if name.startswith("drift/")} == {"drift/cosine", "drift/relative_l2"}
    assert 0 < float(logged[0]["drift/cosine"]) < float(logged[-1]["drift/cosine"])
    if trainer.global_step % 2 == 0:
        (found,) = measure_drift(trainer.lightning_module.backbone, look._batches, look._names).values()
        assert math.isclose(look.last["drift/cosine"], found.main.value, rel_tol=1e-6)


def test_texts_of_a_file_are_read_before_the_fit(tiny, tmp_path):
    (tmp_path / "some.txt").write_text("the film is fine\na story of two friends\n")
    look = DriftMonitor(texts=str(tmp_path / "some.txt"))
    trainer = fit(tiny, tmp_path / "fit", callbacks=[look], max_steps=2)
    assert look._names == ["the film is fine", "a story of two friends"]
    assert trainer.global_step == 2
    with pytest.raises(LoRAError, match="no file"):
        fit(tiny, tmp_path / "none", callbacks=[DriftMonitor(texts=str(tmp_path / "none.txt"))])


def test_numbers_below_1_are_refused():
    for wrong in ({"every_n_steps": 0}, {"count": 0}):
        with pytest.raises(LoRAError, match="at least 1"):
            DriftMonitor(**wrong)
