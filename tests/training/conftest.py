"""One run of the command that several files look at, and how its logs are read."""

import csv
import json
import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from lora_lightning.cli.main import LoRACLI
from tests.wandb_file import Tracked, runs_in


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


@pytest.fixture(scope="session")
def tracked(tiny, tmp_path_factory):
    """A fit with an export, logged to W&B offline and to TensorBoard; a copy of its page; and a test of it."""
    runs = tmp_path_factory.mktemp("tracked")
    wandb.finish()  # an earlier test's: it would be gone on with
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    logger = ["--trainer.logger+=lora_lightning.WandbLogger", "--trainer.logger.save_dir", str(runs)]
    if find_spec("tensorboard"):
        logger += ["--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir", str(runs / "boards")]
    often = ["--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "4"]
    often += ["--trainer.callbacks", "lora_lightning.ExportAtEnd"]
    LoRACLI(args=["fit", "--config", tiny.config, "--runs_dir", str(runs), *often, *logger])
    folder = runs / "tiny" / "version_0"
    (fit,), log = finished(runs), by_step(folder)
    shutil.copyfile(folder / "report.html", folder / "fitted.html")
    LoRACLI(args=["test", "--ckpt_path", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    return SimpleNamespace(runs=runs, folder=folder, fit=fit, all=finished(runs), report=report, log=log)
