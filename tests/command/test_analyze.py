"""`lora-lightning analyze` and `export --scale` as a user calls them: figures, pictures and a page."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stdout

import peft
import pytest
import torch

from lora_lightning import huggingface, load_adapter
from lora_lightning.analysis.strength import validation_metrics
from lora_lightning.cli.build import open_run
from lora_lightning.cli.main import LoRACLI
from lora_lightning.cli.parser import run_command
from lora_lightning.commands.drift import validation_batches
from lora_lightning.lora.bank.strength import scaled
from lora_lightning.training.checkpoints.run_folder import find_checkpoint
from tests.chromium import parsed
from tests.command.process import called, mistake

PICTURES = ["norms", "energy", "ranks", "amplification"]


@pytest.fixture(scope="module")
def a_run(trained, tmp_path_factory):
    """A copy of the tiny run, whose page will show what is measured."""
    folder = tmp_path_factory.mktemp("moved") / "version_0"
    shutil.copytree(trained, folder)
    return folder


@pytest.fixture(scope="module")
def analyzed(a_run):
    """The tiny run, cut, and at three strengths."""
    out, said = a_run.parent / "out", io.StringIO()
    with redirect_stdout(said):
        run_command("analyze", [str(a_run), "--output_dir", str(out), "--truncate", "0.8", "--scales", "1,0,0.5"])
    return out, said.getvalue()


def test_a_run_is_analysed_cut_and_measured_on_its_validation_set(
    tiny, trained, analyzed, tmp_path, monkeypatch, capsys
):
    out, said = analyzed
    found = json.loads((out / "analysis.json").read_text())
    (adapter,) = found["adapters"]
    assert len(adapter["layers"]) == 13
    assert all(layer["base"]["amplification"] > 0 for layer in adapter["layers"])
    cost = found["truncation"]["cost"]["validation"]
    logged = json.loads((trained / "report.json").read_text())
    assert abs(cost["before"]["val/accuracy"] - logged["val_accuracy"]) < 1e-6
    assert cost["after"].keys() == cost["before"].keys()
    assert cost["after"]["val/accuracy"] > 0.6
    assert "val/accuracy" in said
    ranks = found["truncation"]["ranks"].values()
    assert all(1 <= after <= before for before, after in ranks)
    assert any(after < before for before, after in ranks)
    model = huggingface(tiny.bert, num_labels=2)
    load_adapter(model, out / "truncated")
    assert model(torch.tensor([[2, 5, 9, 3]])).logits.shape == (1, 2)
    given = [out / "truncated", "--base_model", "none", "--drift", "run", "--output_dir", tmp_path / "o"]
    assert "name a run" in mistake(monkeypatch, capsys, "analyze", *given)


def test_pictures_and_page_are_there_and_the_page_needs_no_network(analyzed):
    out, _ = analyzed
    for name in PICTURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()
    page = (out / "index.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/svg+xml") == len(PICTURES) + 1, "and that of the drift"
    assert "amplification" in page
    (layer, *_) = json.loads((out / "analysis.json").read_text())["adapters"][0]["layers"]
    assert layer["name"] in page
    assert f"{layer['norm']:.3g}" in page


def test_two_adapters_are_compared_without_w0(trained, tmp_path, monkeypatch, capsys):
    """A checkpoint beside a run: the same one, so that all is shared; it needs the config that says what it is of."""
    copy = tmp_path / "copied" / "copy.ckpt"
    copy.parent.mkdir()
    shutil.copyfile(next((trained / "checkpoints").glob("best*.ckpt")), copy)
    code, said = called(monkeypatch, capsys, "analyze", copy, "--output_dir", tmp_path / "out", "--plots", "false")
    assert code == 2
    assert "analyse an adapter's directory, which `lora-lightning export` writes" in said
    shutil.copy(trained / "config.yaml", copy.parent)
    args = ["analyze", trained, copy, "--output_dir", tmp_path / "out", "--base_model", "none"]
    code, said = called(monkeypatch, capsys, *args)
    assert code == 0, said
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert {layer["base"] for adapter in found["adapters"] for layer in adapter["layers"]} == {None}
    for layer in found["pairs"][0]["layers"]:
        assert all(abs(layer["phi"][i][i] - 1) < 1e-6 for i in range(len(layer["phi"])))
    assert (tmp_path / "out" / "phi-A.png").is_file()
    code, said = called(monkeypatch, capsys, *args, "--layers", "nothing")
    assert (code, "no adapted layer matches" in said) == (2, True)


def test_a_run_is_opened_with_its_base_filled_and_in_the_precision_of_its_fit(tiny, tmp_path):
    fit = ["fit", "--config", tiny.config, "--runs_dir", str(tmp_path), "--trainer.max_steps", "1"]
    meta = ["--model.backbone.init_args.on_meta", "true", "--trainer.precision", "bf16-base"]
    LoRACLI(args=[*fit, *meta, "--trainer.num_sanity_val_steps", "0"])
    opened = open_run(find_checkpoint(tmp_path / "tiny", "last")).module.backbone
    assert not any(p.is_meta for p in opened.parameters())
    assert opened.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    assert opened.bert.encoder.layer[0].output.dense.lora_A.dtype == torch.float32


def test_each_strength_has_its_metric_and_its_drift(a_run, analyzed):
    out, said = analyzed
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


def test_without_strengths_the_figure_of_an_earlier_measurement_goes(a_run, analyzed, tmp_path, monkeypatch, capsys):
    again = tmp_path / "version_0"
    shutil.copytree(a_run, again)
    args = ["--drift", "run", "--drift_texts", "5", "--plots", "false", "--output_dir", tmp_path / "out"]
    code, said = called(monkeypatch, capsys, "analyze", again, *args)
    assert code == 0, said
    assert not (again / "drift.svg").exists()
    page = (again / "report.html").read_text()
    assert "How far it moved from the base" in page
    assert "data:image/svg+xml" not in page


def test_our_validation_is_that_of_the_trainer(trained):
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
