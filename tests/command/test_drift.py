"""`analyze --drift`, `--scales` and `export --scale` as a user calls them, on the tiny run."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout

import peft
import pytest
import torch

from lora_lightning import huggingface
from lora_lightning.analysis.strength import validation_metrics
from lora_lightning.cli.build import open_run
from lora_lightning.cli.parser import run_command
from lora_lightning.commands.drift import validation_batches
from lora_lightning.lora.bank.strength import scaled
from lora_lightning.training.checkpoints.run_folder import find_checkpoint
from tests.chromium import parsed
from tests.command.process import called


@pytest.fixture(scope="module")
def a_run(trained, tmp_path_factory):
    """A copy of the tiny run, whose page will show what is measured."""
    folder = tmp_path_factory.mktemp("moved") / "version_0"
    shutil.copytree(trained, folder)
    return folder


@pytest.fixture(scope="module")
def measured(a_run):
    out, said = a_run.parent / "out", io.StringIO()
    with redirect_stdout(said):
        run_command("analyze", [str(a_run), "--scales", "1,0,0.5", "--output_dir", str(out)])
    return out, said.getvalue()


def test_each_strength_has_its_metric_and_its_drift(a_run, measured):
    out, said = measured
    told = json.loads((out / "analysis.json").read_text())["drift"]
    zero, half, one = told["found"]
    assert [s["scale"] for s in told["found"]] == [0, 0.5, 1]
    assert zero["drift"]["figures"]["cosine"]["value"] == 0
    assert 0 < half["drift"]["figures"]["cosine"]["value"] < one["drift"]["figures"]["cosine"]["value"]
    logged = json.loads((a_run / "report.json").read_text())
    assert abs(one["metrics"]["accuracy"]["value"] - logged["val_accuracy"]) < 1e-6
    assert told["metric"] == "accuracy"
    assert told["chosen"] <= told["best"]
    assert f"{told['chosen']:g} is the smallest strength" in " ".join(said.split())
    assert (out / "drift.png").read_bytes().startswith(b"\x89PNG")
    page = (a_run / "report.html").read_text()  # the run's own page shows it
    for text in ("Gain against drift", "data:image/svg+xml", "The texts that moved most"):
        assert text in page
    parsed(a_run / "report.html")


def test_without_strengths_the_figure_of_an_earlier_measurement_goes(a_run, measured, tmp_path, monkeypatch, capsys):
    again = tmp_path / "version_0"
    shutil.copytree(a_run, again)
    args = ["--drift", "run", "--drift_texts", "5", "--plots", "false", "--output_dir", tmp_path / "out"]
    code, said = called(monkeypatch, capsys, "analyze", again, *args)
    assert code == 0, said
    assert not (again / "drift.svg").exists()
    page = (again / "report.html").read_text()
    assert "How far it moved from the base" in page
    assert "data:image/svg+xml" not in page


def test_ourvalidation_batches_is_that_of_the_trainer(trained):
    opened = open_run(find_checkpoint(trained))
    with scaled(opened.module.backbone, 0.5):
        own = validation_metrics(opened.module.backbone, opened.module.task, validation_batches(opened))
        theirs = opened.validate()
    for name, mean in own.items():
        assert abs(mean.value - theirs[f"val/{name}"]) < 1e-6, name


def test_an_export_of_half_the_strength_is_opened_by_peft(tiny, a_run, tmp_path, monkeypatch, capsys):
    args = ["--ckpt_path", a_run, "--output_dir", tmp_path / "half", "--scale", "0.5"]
    code, said = called(monkeypatch, capsys, "export", *args)
    assert code == 0, said
    report = json.loads((tmp_path / "half" / "export_report.json").read_text())
    assert report["scale"] == 0.5
    config = json.loads((tmp_path / "half" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 4, "alpha is 2 r = 8"
    backbone = open_run(find_checkpoint(a_run)).module.backbone
    batch = {"input_ids": torch.tensor([[2, 5, 9, 3]])}
    with torch.no_grad(), scaled(backbone, 0.5):
        want = backbone(**batch).logits
    wrapped = peft.PeftModel.from_pretrained(huggingface(tiny.bert, num_labels=2), tmp_path / "half" / "adapter")
    torch.testing.assert_close(wrapped.eval()(**batch).logits, want, rtol=1e-5, atol=1e-6)
