"""`RankTelemetry`: the numbers are those of the dense update, and training is what it is without."""

from __future__ import annotations

import csv
import math
import shutil
from dataclasses import astuple

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_lightning import FreezeBase, LoRAConfig, LoRAError, Resume, inject
from lora_lightning.analysis.measures import RankMeasures, base_norm, measures_of, summary, whole_base, whole_layer
from lora_lightning.lora.frozen.spectrum import update_pairs
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.callbacks.rank_telemetry import FILE, HEADER, RankTelemetry, keep_until
from lora_lightning.training.checkpoints import run_folder as run
from tests.distributed import one_process
from tests.lora.laws import stir
from tests.lora.test_quantized import SCHEMES, Net
from tests.training.resuming import EveryState, fit


def rows_of(folder):
    with (folder / FILE).open(newline="") as file:
        return list(csv.DictReader(file))


def dense_measures(layer):
    """By a dense SVD in float64."""
    W0, A, B = (tensor.detach().double() for tensor in (layer.weight, layer.lora_A, layer.lora_B))
    update = layer.lora_settings.alpha / layer.lora_settings.r * (B @ A)
    U, S, Vh = torch.linalg.svd(update)
    q = int((1e-9 * S[0] < S).sum())
    energy = S.square().cumsum(0) / S.square().sum()
    return {
        "norm": float(update.norm()),
        "relative": float(update.norm() / W0.norm()),
        "stable_rank": float((update.norm() / S[0]) ** 2),
        "energy_top": float(energy[0]),
        "energy_half": float(energy[layer.lora_settings.r // 2 - 1]),
        "k90": float((energy < 0.9).sum() + 1),
        "amplification": float(update.norm() / (U[:, :q].T @ W0 @ Vh[:q].T).norm()),
    }


def watched(tiny, folder, look, **options):
    """A fit with a copy of each checkpoint."""
    callbacks = [look, FreezeBase(show_table=False), Resume(), EveryState(save_every=1)]
    return fit(tiny, folder, callbacks=callbacks, **options)


@pytest.fixture(scope="module")
def fits(tiny, tmp_path_factory):
    """The same fit with a look at every second step, and without."""
    folder, look = tmp_path_factory.mktemp("fits"), RankTelemetry(every_n_steps=2)
    return watched(tiny, folder / "with", look), fit(tiny, folder / "without"), look


def test_looking_changes_nothing_of_the_training(fits):
    with_it, without, _ = fits
    one, two = (adapter_tensors(trainer.lightning_module.backbone) for trainer in (with_it, without))
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_each_layers_numbers_are_those_of_the_dense_update(fits):
    trainer, _, watching = fits
    rows = rows_of(trainer_folder(trainer))
    layers = dict(adapted_layers(trainer.lightning_module.backbone))
    assert list(rows[0]) == HEADER
    steps = sorted({int(row["step"]) for row in rows})
    assert steps == list(range(2, trainer.global_step + 1, 2))
    assert len(rows) == len(steps) * len(layers)
    last = {row["layer"]: row for row in rows if int(row["step"]) == steps[-1]}
    assert last.keys() == layers.keys() == watching.last.keys()
    for name, row in last.items():
        got = dict(zip(HEADER[2:], astuple(watching.last[name]), strict=True))
        assert all(math.isclose(float(row[k]), got[k], rel_tol=1e-8) for k in got)
        if steps[-1] == trainer.global_step:
            assert all(math.isclose(got[k], v, rel_tol=1e-4) for k, v in dense_measures(layers[name]).items())


def test_the_log_has_what_all_layers_have_in_common(fits):
    trainer, _, watching = fits
    with (trainer_folder(trainer) / "metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row.get("rank/stable_rank")]
    values = sorted(m.stable_rank for m in watching.last.values())
    assert math.isclose(float(logged[-1]["rank/stable_rank_min"]), values[0], rel_tol=1e-6)
    assert math.isclose(float(logged[-1]["rank/stable_rank_max"]), values[-1], rel_tol=1e-6)
    assert values[0] <= float(logged[-1]["rank/stable_rank"]) <= values[-1]
    assert [int(row["step"]) + 1 for row in logged] == sorted(
        {int(r["step"]) for r in rows_of(trainer_folder(trainer))}
    )
    assert 0 < len([name for name in logged[-1] if name.startswith("rank/")]) < 20


def trainer_folder(trainer: Trainer):
    return run.run_dir(trainer)


@pytest.mark.parametrize(("every", "steps"), [(2, [3]), (None, [6])])
def test_a_resumed_fit_writes_what_the_uninterrupted_one_does(tiny, fits, tmp_path, every, steps):
    whole = fits[0] if every else watched(tiny, tmp_path / "whole", RankTelemetry())
    source = trainer_folder(whole)
    for step in steps:
        folder = tmp_path / str(step) / "run" / "version_0"
        shutil.copytree(source, folder)
        (file,) = (folder / "checkpoints").glob(f"{step:03}-*.ckpt")
        watched(tiny, tmp_path / str(step), RankTelemetry(every_n_steps=every), ckpt=file)
        for name in (FILE, "metrics.csv"):
            assert (folder / name).read_text() == (source / name).read_text(), (step, name)


def test_an_update_that_is_zero_has_no_numbers():
    model = nn.Sequential(nn.Linear(6, 5))
    inject(model, LoRAConfig(r=2))
    ((_, layer),) = adapted_layers(model)
    found = measures_of(update_pairs(layer), 2.0, base_norm(whole_base(layer)), whole_base(layer))
    assert (found.norm, found.relative) == (0.0, 0.0)
    assert all(math.isnan(value) for value in astuple(found)[2:])
    assert summary([found]) == {f"rank/relative{end}": 0.0 for end in ("_min", "", "_max")}


def test_the_median_is_between():
    one = RankMeasures(norm=1, relative=1, stable_rank=1, energy_top=1, energy_half=1, k90=1, amplification=math.nan)
    two = RankMeasures(norm=3, relative=4, stable_rank=3, energy_top=0, energy_half=1, k90=2, amplification=5.0)
    told = summary([one, two])
    assert (told["rank/relative_min"], told["rank/relative"], told["rank/relative_max"]) == (1, 2.5, 4)
    assert told["rank/amplification"] == 5.0
    assert not any("norm" in name for name in told)


def test_sharded_layers_are_seen_whole():
    """FSDP2's tensors, on a mesh of one process, and the same layers before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Conv1d(4, 6, 3), nn.MultiheadAttention(8, 2))
    inject(model, LoRAConfig(r=4, target_modules=r"\d|2\.out_proj"))
    stir(model)

    def looked():
        return {
            name: measures_of(
                update_pairs(whole_layer(layer)),
                layer.lora_settings.scale,
                base_norm(whole_base(layer)),
                whole_base(layer),
            )
            for name, layer in adapted_layers(model)
        }

    before = looked()
    with one_process() as mesh:
        fully_shard(model, mesh=mesh)
        assert looked() == before
    assert len(before) == 4


def test_rows_of_later_steps_and_torn_ones_are_dropped(tmp_path):
    file = tmp_path / FILE
    row = "{},a,1,1,1,1,1,1,1\r\n"
    file.write_bytes((",".join(HEADER) + "\r\n" + row.format(2) + row.format(4) + row.format(6) + "8,a,1").encode())
    keep_until(file, 4)
    assert [int(row["step"]) for row in rows_of(tmp_path)] == [2, 4]


def test_mistakes_are_named(make_module):
    with pytest.raises(LoRAError, match="every_n_steps must be at least 1"):
        RankTelemetry(every_n_steps=0)
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(LoRAError, match="looks at a LoRAModule"):
        RankTelemetry().setup(Trainer(logger=False, accelerator="cpu"), BoringModel(), "fit")


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_quantized_base_is_seen_as_what_it_stands_for(scheme):
    torch.manual_seed(0)
    model = SCHEMES[scheme](Net())
    inject(model, LoRAConfig(r=4, target_modules=["square"]))
    stir(model)
    ((_, layer),) = adapted_layers(model)
    W0 = layer.base_weight().double()
    (matrix,) = whole_base(layer)
    assert torch.equal(matrix.double(), W0)
    found = measures_of(update_pairs(layer), layer.lora_settings.scale, base_norm([matrix]), [matrix])
    update = layer.lora_settings.scale * (layer.lora_B.double() @ layer.lora_A.double()).detach()
    U, _, Vh = torch.linalg.svd(update)
    assert math.isclose(found.relative, float(update.norm() / W0.norm()), rel_tol=1e-6)
    inside = float((U[:, :4].T @ W0 @ Vh[:4].T).norm())
    assert math.isclose(found.amplification, float(update.norm()) / inside, rel_tol=1e-5)


@pytest.mark.slow
def test_two_processes_write_one_file(tiny, tmp_path):
    """As many rows as one process, each the update that both hold."""
    trainer = watched(
        tiny,
        tmp_path,
        RankTelemetry(every_n_steps=2),
        devices=2,
        strategy="ddp_fork",
        data={"batch_size": 10},
        max_epochs=1,
    )
    rows = rows_of(tmp_path / "run" / "version_0")
    layers = [name for name, _ in adapted_layers(trainer.lightning_module.backbone)]
    assert [(int(row["step"]), row["layer"]) for row in rows] == [(step, name) for step in (2, 4, 6) for name in layers]
    with (tmp_path / "run" / "version_0" / "metrics.csv").open() as file:
        assert sum(bool(row["rank/k90"]) for row in csv.DictReader(file)) == 3
