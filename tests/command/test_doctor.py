"""`lora-lightning doctor` says what is there, what would help, and whether it works."""

import json

import pytest
import torch
from packaging.version import Version

from lora_lightning.commands import doctor as doctors
from lora_lightning.commands import tiny_fit as tiny_fits
from lora_lightning.commands.tiny_fit import tiny_fit
from tests.command.process import command


def test_all_is_well_here_and_its_fit_learns_and_leaves_nothing(monkeypatch, capsys, tmp_path):
    figures = []
    monkeypatch.setattr(tiny_fits, "tiny_fit", lambda: figures.append(tiny_fit()) or figures[0])
    command(monkeypatch, "doctor")
    said = capsys.readouterr().out
    assert "all that every run needs works" in said
    for name in ("python", "torch", "lightning", "cpu", "plots", "Weights & Biases", "disk", "tiny fit"):
        assert f"\n  {name}" in said
    assert "pip install 'lora_lightning[" in said or "would add" not in said
    assert figures[0].after < figures[0].before / 2
    assert figures[0].apart < 1e-4
    assert not list(tmp_path.iterdir())


def lacks(monkeypatch, package):
    there = doctors.installed_version
    monkeypatch.setattr(doctors, "installed_version", lambda name: None if name == package else there(name))


def test_what_no_run_needs_is_told_as_json_with_what_it_would_add_and_how(monkeypatch, capsys):
    lacks(monkeypatch, "matplotlib")
    command(monkeypatch, "doctor", "--json", "--fit", "false")
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    by_name = {finding["name"]: finding["said"] for finding in told["findings"]}
    # A package index's wheel says 2.9.0 of a torch that calls itself 2.9.0+cu128.
    assert Version(by_name["torch"]).public == Version(torch.__version__).public
    assert "tiny fit" not in by_name
    assert (
        by_name["plots"] == "would add the figures of analyze (lacks matplotlib): pip install 'lora_lightning[plots]'"
    )


def test_what_does_not_work_is_told_with_its_reason(monkeypatch, capsys, tmp_path):
    def fails():
        raise RuntimeError("no kernel image is available")

    lacks(monkeypatch, "torch")
    monkeypatch.setattr(tiny_fits, "tiny_fit", fails)
    (tmp_path / "runs").write_text("")
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "doctor")
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "RuntimeError: no kernel image is available" in " ".join(said.split())
    assert said.splitlines()[-1] == "does not work: torch, disk, tiny fit"
