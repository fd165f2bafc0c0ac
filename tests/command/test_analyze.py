"""`lora-lightning analyze` as a user calls it: on runs, checkpoints and directories, with pictures and a page."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stdout

import pytest
import torch

from lora_lightning import huggingface, load_adapter
from lora_lightning.cli.build import open_run
from lora_lightning.cli.main import LoRACLI
from lora_lightning.cli.parser import run_command
from lora_lightning.training.checkpoints.run_folder import find_checkpoint
from tests.command.process import called, mistake

PICTURES = ["norms", "energy", "ranks", "amplification"]


@pytest.fixture(scope="module")
def analyzed(trained, tmp_path_factory):
    """The tiny run, cut."""
    out, said = tmp_path_factory.mktemp("analyzed") / "out", io.StringIO()
    with redirect_stdout(said):
        run_command("analyze", [str(trained), "--output_dir", str(out), "--truncate", "0.8"])
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
    assert page.count("data:image/svg+xml") == len(PICTURES)
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
    fewer = called(monkeypatch, capsys, "analyze", copy, *args[3:], "--plots", "false")
    assert fewer[0] == 0
    assert not list((tmp_path / "out").glob("*.png")), "of the earlier analysis, which is replaced"
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
