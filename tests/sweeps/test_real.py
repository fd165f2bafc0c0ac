"""A sweep of real fits of the tiny model, by the command."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from lora_lightning.commands.sweep.base_config import open_base
from tests.command.process import command, mistake


@pytest.mark.slow
def test_a_sweep_of_real_fits_ranks_them_and_reports_each_validation_to_a_pruner(tiny, tmp_path, monkeypatch, capsys):
    """One of the two cannot be fitted: its rank is above the model's width of 32."""
    grid = ["--grid", "model.lora.r=2,99", "--pruner", "median", "--trainer.max_epochs", "3"]
    command(monkeypatch, "sweep", "-c", tiny.config, *grid)
    said = capsys.readouterr().out
    assert "r=99 is larger than the smaller side of its weight" in said
    assert "the test set was not used" in said
    folder = tmp_path / "runs/tiny-sweep"
    told = json.loads((folder / "sweep.json").read_text())
    first, second = (point["trials"][0] for point in told["ranking"])
    assert (first["state"], second["state"]) == ("complete", "failed")
    with (folder / "000_r-2/version_0/metrics.csv").open() as file:
        logged = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
    assert len(logged) == 3
    assert first["reported"] == pytest.approx(logged)
    assert first["value"] == pytest.approx(max(logged))
    report = json.loads((folder / "000_r-2/version_0/report.json").read_text())
    assert first["trainable"] == report["trainable"]
    assert f"lora-lightning test --ckpt_path {first['run']}" in said
    assert (folder / "rank.png").is_file()


@pytest.mark.slow
def test_a_pruner_ends_a_live_fit_that_learns_nothing(tiny, tmp_path, monkeypatch):
    """Two learn; the third, with a learning rate of nothing, is ended after a validation, saved and ranked behind."""
    lr = "model.optimizer.init_args.lr"
    flags = ["--pruner", "median", "--metric", "val/loss", "--mode", "min", "--trainer.max_epochs", "40"]
    command(monkeypatch, "sweep", "-c", tiny.config, "--grid", f"{lr}=1e-2,5e-3,1e-12", *flags, "--plots", "false")
    folder = tmp_path / "runs/tiny-sweep"
    ranking = json.loads((folder / "sweep.json").read_text())["ranking"]
    states = {point["values"][lr]: point["state"] for point in ranking}
    assert states == {"1e-2": "complete", "5e-3": "complete", "1e-12": "pruned"}
    (trial,) = ranking[-1]["trials"]
    assert 0 < len(trial["reported"]) < 40
    assert trial["value"] == min(trial["reported"])
    assert "SIGTERM" in (folder / trial["name"] / "log.txt").read_text()
    assert not (folder / trial["name"] / "version_0/report.json").exists()


REFUSED = {
    "model.lora.rank": ["model.lora.rank=1,2"],
    "two": ["model.lora.r=1,two"],
    "got 1.5": ["model.lora.dropout=0,1.5"],
    "did you mean 'val/accuracy' or 'val/f1'": ["model.lora.r=1,2", "--metric", "val/acc", "--mode", "max"],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_fit_refuses_or_never_logs_is_told_in_one_line_before_anything_runs(
    tiny, tmp_path, monkeypatch, capsys, said
):
    assert said in mistake(monkeypatch, capsys, "sweep", "-c", tiny.config, "--grid", *REFUSED[said])
    assert not (tmp_path / "runs").exists()


def test_what_chooses_the_best_checkpoint_also_ranks(tiny, tmp_path):
    asked = {"class_path": "lora_lightning.Checkpoints", "init_args": {"monitor": "val/loss", "mode": "min"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [asked]}}))
    base = open_base(["-c", tiny.config, "-c", str(tmp_path / "own.yaml")])
    assert (base.metric, base.goal) == ("val/loss", "min")
    assert all(parameter.is_meta for parameter in base.backbone.parameters())
