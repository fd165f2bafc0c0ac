"""What an offline W&B run holds, read back from its file; and that other loggers have the same numbers."""

import csv
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from wandb.proto.wandb_internal_pb2 import Record

from lora_lightning.cli.main import LoRACLI
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.tracking.wandb_logger import WandbLogger
from tests.wandb_file import Tracked, payloads, runs_in

BOARDS = find_spec("tensorboard") is not None


def manifests(folder: Path) -> dict[str, list[str]]:
    """The files of each artifact, by its name and aliases."""
    found = {}
    for file in sorted((folder / "wandb").glob("*run-*/run-*.wandb"), key=lambda file: file.parent.name):
        for payload in payloads(file.read_bytes()):
            record = Record()
            record.ParseFromString(payload)
            if record.HasField("request") and record.request.HasField("log_artifact"):
                made = record.request.log_artifact.artifact
            elif record.HasField("artifact"):
                made = record.artifact
            else:
                continue
            found[f"{made.name}:{','.join(made.aliases)}"] = [entry.path for entry in made.manifest.contents]
    return found


def by_step(folder: Path) -> dict[str, dict[int, float]]:
    """The columns of the CSV log."""
    found: dict[str, dict[int, float]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text and name not in ("step", "epoch"):
                    found.setdefault(name, {})[int(row["step"])] = float(text)
    return found


def finished(folder: Path) -> list[Tracked]:
    """The runs once W&B's own process has written their ends."""
    wandb.finish()
    until = time.monotonic() + 20
    while any(run.exit_code is None for run in runs_in(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    return runs_in(folder)


@pytest.fixture(scope="module")
def tracked(tiny, tmp_path_factory):
    """A fit with an export, logged to W&B offline and to TensorBoard, and a test of it."""
    runs = tmp_path_factory.mktemp("tracked")
    wandb.finish()  # an earlier test's: it would be gone on with
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    logger = ["--trainer.logger+=lora_lightning.WandbLogger", "--trainer.logger.save_dir", str(runs)]
    if BOARDS:
        logger += ["--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir", str(runs / "boards")]
    often = ["--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "4", "--trainer.callbacks"]
    often += ["lora_lightning.ExportAtEnd", "--trainer.gradient_clip_val", "0.001"]
    LoRACLI(args=["fit", "--config", tiny.config, "--runs_dir", str(runs), *often, *logger])
    folder = runs / "tiny" / "version_0"
    (fit,), log = finished(runs), by_step(folder)
    LoRACLI(args=["test", "--ckpt_path", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    return SimpleNamespace(runs=runs, folder=folder, fit=fit, all=finished(runs), report=report, log=log)


def test_one_run_holds_config_counts_history_and_summary(tracked):
    run, config, report = tracked.fit, tracked.fit.config, tracked.report
    written = yaml.safe_load((tracked.folder / "config.yaml").read_text())
    for key in ("model", "data", "trainer", "seed_everything", "name", "runs_dir"):
        assert config[key] == written[key], "the whole resolved config"
    for name in ("trainable", "share"):
        assert config[f"params/{name}"] == run.summary[f"params/{name}"] == report[name]
    assert config["params/frozen"] == run.summary["params/frozen"] == report["total"] - report["trainable"]
    assert config["params/adapter_bytes"] == run.summary["params/adapter_bytes"] == 4 * report["trainable"]
    assert 0 < report["adapter_bytes"] - config["params/adapter_bytes"] < 10_000, "the file has a header"
    for name in ("val_accuracy", "w0_unchanged", "export_max_rel_diff"):
        assert run.summary["report"][name] == report[name]


def test_its_history_and_tensorboards_are_the_csv_log(tracked):
    wanted = {"lr", "grad_norm/A", "grad_norm/B", "grad_norm/all", "train/loss_step", "val/accuracy", "val/loss"}
    wanted |= {"throughput/samples_per_second", "throughput/tokens_per_second", "memory/process_peak_mib"}
    assert wanted <= set(tracked.log)
    for name, values in tracked.log.items():
        assert tracked.fit.points(name) == pytest.approx(values), name
    if not BOARDS:
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (tracked.runs / "boards").rglob("events.out.*")}
    board = EventAccumulator(str(folder)).Reload()
    for name, values in tracked.log.items():
        assert {e.step: e.value for e in board.Scalars(name)} == pytest.approx(values, rel=1e-6), name


def test_gradient_norms_are_those_before_clipping(tracked):
    """Clipped to 0.001 in this fit: after it nothing could be above."""
    for step, whole in tracked.log["grad_norm/all"].items():
        assert whole > 0.001
        parts = (tracked.log[f"grad_norm/{part}"][step] ** 2 for part in "AB")
        assert sum(parts) <= whole**2 * (1 + 1e-6)


def test_tables_hold_what_trains_and_what_is_predicted(tracked):
    (folder,) = [f for f in (tracked.runs / "wandb").glob("offline-run-*") if list(f.rglob("*.table.json"))]
    tables = {f.name.partition("_")[0]: json.loads(f.read_text()) for f in folder.rglob("*.table.json")}
    injection, predictions = tables["injection"], tables["predictions"]
    trained = sum(row[injection["columns"].index("parameters")] for row in injection["data"])
    assert trained == tracked.report["trainable"]
    assert ["classifier", "in full"] in [row[:2] for row in injection["data"]]
    assert predictions["columns"][:3] == ["input", "target", "prediction"]
    assert len(predictions["data"]) == 16
    assert {row[1] for row in predictions["data"]} == {"fresh", "rotten"}
    assert all(" " in row[0] and "[PAD]" not in row[0] for row in predictions["data"])


def test_artifacts_are_the_adapter_its_report_and_the_export(tracked):
    files, run = manifests(tracked.runs), tracked.fit
    adapters = {name: paths for name, paths in files.items() if name.startswith(f"adapter-{run.id}:")}
    assert {alias for name in adapters for alias in name.partition(":")[2].split(",")} == {"best", "latest"}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "report.json", "report.html", "config.yaml"}
    assert all(wanted <= set(paths) for paths in adapters.values())
    (export,) = (paths for name, paths in files.items() if name.startswith(f"export-{run.id}:"))
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors", "export_report.json"} <= set(export)


def test_a_test_of_the_run_belongs_to_the_run(tracked):
    assert {run.id for run in tracked.all} == {tracked.fit.id}
    summaries = [run.summary.get("report", {}) for run in tracked.all]
    accuracies = [summary["test_accuracy"] for summary in summaries if "test_accuracy" in summary]
    assert accuracies == [tracked.report["test_accuracy"]]


def test_without_a_key_online_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(LoRAError, match=r"no key here: run `wandb login`, set WANDB_API_KEY, or leave `offline` out"):
        WandbLogger(offline=False, save_dir=str(tmp_path))
    assert WandbLogger(save_dir=str(tmp_path))._offline is True
