"""`RankTelemetry` and `DriftMonitor`: their numbers are those of the update, and training is what it is without."""

from __future__ import annotations

import math
import shutil
from dataclasses import astuple, replace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_lightning import DriftMonitor, LoRAConfig, LoRAError, inject
from lora_lightning.analysis.drift import measure_drift
from lora_lightning.analysis.measures import RankMeasures, base_norm, measures_of, summary, whole_base, whole_layer
from lora_lightning.analysis.spectra import update_pairs
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.callbacks.monitors import FILE, HEADER, RankTelemetry
from tests.distributed import one_process
from tests.lora.laws import stir
from tests.lora.test_quantized import SCHEMES, Net
from tests.training.resuming import at, fit, logged


def looked_at(layer):
    """What `RankTelemetry` measures of a layer."""
    base = whole_base(layer)
    return measures_of(update_pairs(whole_layer(layer)), layer.lora_settings.scale, base_norm(base), base)


def dense_measures(layer, W0):
    """By a dense SVD in float64."""
    A, B = (tensor.detach().double() for tensor in (layer.lora_A, layer.lora_B))
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


@pytest.fixture(scope="module")
def fits(tiny, tmp_path_factory):
    """The same fit with looks at every second step, and without; and the folder of the first."""
    folder, rank, drift = tmp_path_factory.mktemp("fits"), RankTelemetry(2), DriftMonitor(every_n_steps=2, count=12)
    watched, plain = fit(tiny, folder / "with", rank, drift), fit(tiny, folder / "without")
    one, two = (adapter_tensors(trainer.lightning_module.backbone) for trainer in (watched, plain))
    assert all(torch.equal(one[key], two[key]) for key in two), "looking changes nothing of the training"
    assert watched.global_step % 2 == 0
    return watched, folder / "with", rank, drift


def test_each_layers_numbers_are_the_dense_updates_and_the_log_has_their_range(fits):
    trainer, folder, watching, _ = fits
    rows, layers = logged(folder, FILE), dict(adapted_layers(trainer.lightning_module.backbone))
    assert list(rows[0]) == HEADER
    steps = list(range(2, trainer.global_step + 1, 2))
    assert [(int(row["step"]), row["layer"]) for row in rows] == [(step, name) for step in steps for name in layers]
    assert layers.keys() == watching.last.keys()
    for row in rows[-len(layers) :]:
        got, layer = astuple(watching.last[row["layer"]]), layers[row["layer"]]
        assert [float(row[name]) for name in HEADER[2:]] == pytest.approx(got, rel=1e-8)
        wanted = dense_measures(layer, layer.weight.detach().double())
        assert {name: float(row[name]) for name in wanted} == pytest.approx(wanted, rel=1e-4)
    rows = [row for row in logged(folder) if row.get("rank/stable_rank")]
    values = sorted(m.stable_rank for m in watching.last.values())
    found = [float(rows[-1][f"rank/stable_rank{end}"]) for end in ("_min", "", "_max")]
    assert (found[0], found[2]) == pytest.approx((values[0], values[-1]), rel=1e-6)
    assert values[0] <= found[1] <= values[-1]
    assert [int(row["step"]) + 1 for row in rows] == list(range(2, trainer.global_step + 1, 2))


def test_each_look_at_drift_is_in_the_log_and_the_last_is_what_is_measured(fits):
    trainer, folder, _, look = fits
    rows = [row for row in logged(folder) if row.get("drift/cosine")]
    assert [int(row["step"]) + 1 for row in rows] == list(range(2, trainer.global_step + 1, 2))
    assert {name for name in rows[-1] if name.startswith("drift/")} == {"drift/cosine", "drift/relative_l2"}
    assert 0 < float(rows[0]["drift/cosine"]) < float(rows[-1]["drift/cosine"])
    (found,) = measure_drift(trainer.lightning_module.backbone, look._batches, look._names).values()
    assert math.isclose(look.last["drift/cosine"], found.main.value, rel_tol=1e-6)


@pytest.mark.parametrize(("every", "step"), [(2, 3), (None, 6)])
def test_a_resumed_fit_writes_what_the_uninterrupted_one_does(tiny, tmp_path, every, step):
    fit(tiny, tmp_path / "whole", RankTelemetry(every_n_steps=every), max_epochs=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "on")
    fit(tiny, tmp_path / "on", RankTelemetry(every_n_steps=every), ckpt=at(tmp_path / "on", step), max_epochs=2)
    for name in (FILE, "metrics.csv"):
        assert logged(tmp_path / "on", name) == logged(tmp_path / "whole", name)


def test_an_update_that_is_zero_has_no_numbers_and_the_median_is_between():
    model = nn.Sequential(nn.Linear(6, 5))
    inject(model, LoRAConfig(r=2))
    ((_, layer),) = adapted_layers(model)
    found = looked_at(layer)
    assert (found.norm, found.relative) == (0.0, 0.0)
    assert all(math.isnan(value) for value in astuple(found)[2:])
    assert summary([found]) == {f"rank/relative{end}": 0.0 for end in ("_min", "", "_max")}
    one = RankMeasures(norm=1, relative=1, stable_rank=1, energy_top=1, energy_half=1, k90=1, amplification=math.nan)
    two = replace(one, relative=4, amplification=5.0)
    told = summary([one, two])
    assert (told["rank/relative_min"], told["rank/relative"], told["rank/relative_max"]) == (1, 2.5, 4)
    assert told["rank/amplification"] == 5.0


def test_sharded_layers_are_seen_whole():
    """FSDP2's tensors, on a mesh of one process, and the same layers before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Conv1d(4, 6, 3), nn.MultiheadAttention(8, 2))
    inject(model, LoRAConfig(r=4, target_modules=r"\d|2\.out_proj"))
    stir(model)
    before = {name: looked_at(layer) for name, layer in adapted_layers(model)}
    with one_process() as mesh:
        fully_shard(model, mesh=mesh)
        assert {name: looked_at(layer) for name, layer in adapted_layers(model)} == before
    assert len(before) == 4


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_quantized_base_is_seen_as_what_it_stands_for(scheme):
    torch.manual_seed(0)
    model = SCHEMES[scheme](Net())
    inject(model, LoRAConfig(r=4, target_modules=["square"]))
    stir(model)
    ((_, layer),) = adapted_layers(model)
    found, wanted = looked_at(layer), dense_measures(layer, layer.base_weight().double())
    assert found.relative == pytest.approx(wanted["relative"], rel=1e-6)
    assert found.amplification == pytest.approx(wanted["amplification"], rel=1e-5)


def test_texts_of_a_file_are_read_before_the_fit(tiny, tmp_path):
    (tmp_path / "some.txt").write_text("the film is fine\na story of two friends\n")
    look = DriftMonitor(texts=str(tmp_path / "some.txt"))
    assert fit(tiny, tmp_path / "fit", callbacks=[look], max_steps=2).global_step == 2
    assert look._names == ["the film is fine", "a story of two friends"]
    with pytest.raises(LoRAError, match="no file"):
        fit(tiny, tmp_path / "none", callbacks=[DriftMonitor(texts=str(tmp_path / "none.txt"))])
