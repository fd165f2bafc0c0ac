"""What an offline W&B run holds, read back from its file; and that other loggers have the same numbers."""

import json
from importlib.util import find_spec

import pytest
import yaml

from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.tracking.loggers import WandbLogger


def test_one_run_holds_config_counts_and_summary_and_a_test_of_the_run_belongs_to_it(tracked):
    run, config, report = tracked.fit, tracked.fit.config, tracked.report
    written = yaml.safe_load((tracked.folder / "config.yaml").read_text())
    for key in ("model", "data", "trainer", "seed_everything", "name", "runs_dir"):
        assert config[key] == written[key], "the whole resolved config"
    for name in ("trainable", "share"):
        assert config[f"params/{name}"] == run.summary[f"params/{name}"] == report[name]
    assert config["params/frozen"] == run.summary["params/frozen"] == report["total"] - report["trainable"]
    for name in ("val_accuracy", "w0_unchanged", "export_max_rel_diff"):
        assert run.summary["report"][name] == report[name]
    assert {run.id for run in tracked.all} == {run.id}
    summaries = [run.summary.get("report", {}) for run in tracked.all]
    assert [said["test_accuracy"] for said in summaries if "test_accuracy" in said] == [report["test_accuracy"]]


def test_its_history_and_tensorboards_are_the_csv_log(tracked):
    assert {"lr", "grad_norm/all", "train/loss_step", "val/loss", "throughput/tokens_per_second"} <= set(tracked.log)
    assert [*tracked.log["export/max_rel_diff"].values()] == pytest.approx([tracked.report["export_max_rel_diff"]])
    for name, values in tracked.log.items():
        assert tracked.fit.points(name) == pytest.approx(values), name
    if not find_spec("tensorboard"):
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (tracked.runs / "boards").rglob("events.out.*")}
    board = EventAccumulator(str(folder)).Reload()
    for name, values in tracked.log.items():
        assert {e.step: e.value for e in board.Scalars(name)} == pytest.approx(values, rel=1e-6), name


def test_tables_hold_what_trains_and_is_predicted_and_artifacts_the_adapter_its_report_and_the_export(tracked):
    (folder,) = [f for f in (tracked.runs / "wandb").glob("offline-run-*") if list(f.rglob("*.table.json"))]
    tables = {f.name.partition("_")[0]: json.loads(f.read_text()) for f in folder.rglob("*.table.json")}
    injection, predictions = tables["injection"], tables["predictions"]
    trained = sum(row[injection["columns"].index("parameters")] for row in injection["data"])
    assert trained == tracked.report["trainable"]
    assert predictions["columns"][:3] == ["input", "target", "prediction"]
    assert len(predictions["data"]) == 16
    assert all(" " in row[0] and "[PAD]" not in row[0] for row in predictions["data"])
    files, run = {name: paths for run in tracked.all for name, paths in run.artifacts.items()}, tracked.fit
    adapters = {name: paths for name, paths in files.items() if name.startswith(f"adapter-{run.id}:")}
    assert {alias for name in adapters for alias in name.partition(":")[2].split(",")} == {"best", "latest"}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "report.json", "report.html", "config.yaml"}
    assert all(wanted <= set(paths) for paths in adapters.values())
    (export,) = (paths for name, paths in files.items() if name.startswith(f"export-{run.id}:"))
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors", "export_report.json"} <= set(export)


def test_without_a_key_online_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(LoRAError, match=r"no key here: run `wandb login`, set WANDB_API_KEY, or leave `offline` out"):
        WandbLogger(offline=False, save_dir=str(tmp_path))
    assert WandbLogger(save_dir=str(tmp_path))._offline is True
