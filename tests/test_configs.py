"""Every YAML in configs/ is parsed; every overlay runs over a tiny run."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import wandb
import yaml

from lora_lightning.cli.main import LoRACLI
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import REPOSITORY, command
from tests.recipes.recipe import parse

CONFIGS = REPOSITORY / "configs"
OVERLAYS = ["debug.yaml"]
for folder in ("logger", "precision", "strategy"):
    OVERLAYS += sorted(str(p.relative_to(CONFIGS)) for p in (CONFIGS / folder).glob("*.yaml"))


# Strategies have tests of their own; 4-bit products on a CPU take widths in multiples of 64 (recipes/test_steps.py).
@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if not o.startswith(("strategy", "precision/nf4"))])
def test_overlay_works_with_fit_test_and_export(overlay, tiny, tmp_path):
    assert (CONFIGS / overlay).read_text().startswith("# Overlay: ")
    both = ["--config", tiny.config, "--config", str(CONFIGS / overlay), "--trainer.max_epochs", "1"]
    LoRACLI(args=["fit", *both])
    LoRACLI(args=["test", *both, "--ckpt_path", "best"])
    LoRACLI(args=["export", *both, "--ckpt_path", "best"])
    report = json.loads(next((tmp_path / "runs").glob("*/report.json")).read_text())
    assert {"val_accuracy", "test_accuracy", "export_max_rel_diff"} <= set(report)
    assert report["w0_unchanged"]
    if overlay == "precision/bf16-base.yaml":
        saved = yaml.safe_load((tmp_path / "runs/tiny/version_0/config.yaml").read_text())
        assert saved["model"]["backbone"]["init_args"]["dtype"] is None  # the word says it, to each command
        assert report["dtypes"]["w0"].keys() == {"bfloat16"}
    if overlay.startswith("logger/wandb"):
        wandb.finish()  # a process of its own writes the file, in its own time
        assert list((tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o.startswith(("strategy", "precision/nf4"))])
def test_an_overlay_of_larger_machines_is_parsed(overlay):
    assert parse(["demo.yaml", overlay]).trainer.devices


def test_a_runs_own_config_runs_again_and_gives_the_same_adapter(trained, tmp_path):
    LoRACLI(args=["fit", "--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path / "again")])
    first = load_checkpoint(trained / "checkpoints" / "last.ckpt")["state_dict"]
    again = load_checkpoint(tmp_path / "again/tiny/version_0/checkpoints/last.ckpt")["state_dict"]
    assert all((first[key] == again[key]).all() for key in first)


def test_without_a_logger_nothing_is_written_but_checkpoints_under_runs(tiny, tmp_path):
    LoRACLI(args=["fit", "--config", tiny.config, "--trainer.logger", "false", "--trainer.max_epochs", "1"])
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    left = {"checkpoints", "best.ckpt", "last.ckpt", "last.ckpt.previous"}
    assert {p.name for p in (tmp_path / "runs/tiny").rglob("*")} == left
    LoRACLI(args=["export", "--config", tiny.config, "--ckpt_path", "best"])
    assert (tmp_path / "runs/tiny/export/merged/config.json").is_file()


def test_without_validation_the_newest_checkpoint_is_the_best_and_alpha_left_out_follows_r(tiny, tmp_path):
    only = ["--data.init_args.split.validation", "0", "--data.init_args.split.test", "0", "--trainer.max_epochs", "1"]
    cli = LoRACLI(args=["fit", "--config", tiny.config, *only, "--model.lora.r", "2"])
    assert {row.alpha for row in cli.model.report.modules} == {4.0}
    LoRACLI(args=["export", "--ckpt_path", "runs/tiny"])
    assert (tmp_path / "runs/tiny/version_0/export/merged/config.json").is_file()


# ---- what `--print_config` prints is a file that runs, and says what the command line said


@pytest.fixture
def printed(monkeypatch, capsys, tmp_path):
    """A file of what a command line prints with `--print_config`."""

    def make(*args, name="printed.yaml"):
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            command(monkeypatch, *args, "--print_config")
        file = tmp_path / name
        file.write_text(capsys.readouterr().out)
        return file

    return make


OVERLAID = ["demo.yaml", "precision/bf16-base.yaml", "strategy/ddp.yaml", "debug.yaml"]


@pytest.mark.parametrize("files", [["demo-lm.yaml"], ["demo-vision.yaml"], OVERLAID], ids=lambda files: files[0])
def test_what_is_printed_is_read_as_it_was_said(files, printed, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # where the recipes' own classes and files are
    args = [part for file in files for part in ("-c", str(REPOSITORY / "configs" / file))]
    first = printed("fit", *args)
    again = printed("fit", "-c", str(first), name="again.yaml")
    assert yaml.safe_load(again.read_text()) == yaml.safe_load(first.read_text())
    assert yaml.safe_load(first.read_text())["model"]["lora"]["r"] > 0


def test_it_runs_and_null_by_a_flag_is_null_within_a_section_of_a_class_too(tiny, printed, monkeypatch, tmp_path):
    file = printed("fit", "-c", tiny.config, "--trainer.max_epochs", "1", "--data.split.group_by", "null")
    assert yaml.safe_load(file.read_text())["data"]["init_args"]["split"]["group_by"] is None
    command(monkeypatch, "fit", "-c", file, "--name", "again")
    assert (tmp_path / "runs/again/version_0/report.json").is_file()
    saved = tmp_path / "runs/again/version_0/config.yaml"
    entered, chdir = [], os.chdir
    monkeypatch.setattr(os, "chdir", lambda folder: (entered.append(Path(folder).name), chdir(folder)))
    command(monkeypatch, "fit", "-c", saved, "--name", "saved")
    assert (tmp_path / "runs/saved/version_0/report.json").is_file()
    assert set(entered) == {"version_0", tmp_path.name}  # to read the file, and back
    assert entered.count("version_0") == 1, "the fit left its folder, from which a logger's thread writes"
