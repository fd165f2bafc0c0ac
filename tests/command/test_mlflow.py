"""MLflow through the command: the figures of the CSV log, each under its step, in one run that others take up."""

import json
import math

import pytest

from tests.command.process import command, logged_rows

pytest.importorskip("mlflow")


def histories(store):
    """Of the store's only run: by metric, the values that it has under each step."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 1, [(r.info.run_id, r.info.status, sorted(r.data.metrics)) for r in runs]
    (run,) = runs
    found = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            found.setdefault(name, {}).setdefault(point.step, []).append(point.value)
    return run, found


def test_mlflow_has_the_figures_of_the_csv_log_in_one_run_also_after_going_on(tiny, tmp_path, monkeypatch):
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    given = {"experiment_name": "tiny", "tracking_uri": store}
    logger = json.dumps({"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": given})
    fit = ["fit", "--config", tiny.config, "--trainer.logger", logger, "--trainer.log_every_n_steps", 1]
    command(monkeypatch, *fit, "--trainer.max_epochs", 1)
    command(monkeypatch, *fit, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    command(monkeypatch, "test", "--ckpt_path", "runs/tiny")

    run, logged = histories(store)
    rows = logged_rows(tmp_path / "runs/tiny/version_0/metrics.csv")
    named = {(name, int(row["step"])): float(row[name]) for row in rows for name in row if row[name]}
    figures = {key: value for key, value in named.items() if key[0] not in ("step", "epoch")}
    assert {"train/loss_step", "val/loss", "val/accuracy", "params/trainable"} <= {name for name, _ in figures}
    for (name, step), value in figures.items():
        values = logged[name][step]
        assert all(math.isclose(v, value, rel_tol=1e-12) for v in values), (name, step, values, value)
        assert len(values) == 1 or name.startswith("params/"), (name, step, values)
    assert run.data.params["lora/r"] == "4"
    assert 0 <= run.data.metrics["test/accuracy"] <= 1
