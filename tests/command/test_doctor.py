"""`lora-lightning doctor` says what is there, what would help, and whether it works."""

import json
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from lora_lightning.commands import doctor as doctors
from lora_lightning.commands.tiny_fit import tiny_fit
from tests.command.process import command


def test_all_is_well_here(monkeypatch, capsys):
    command(monkeypatch, "doctor")
    said = capsys.readouterr().out
    assert "all that every run needs works" in said
    for name in ("python", "torch", "lightning", "cpu", "plots", "Weights & Biases", "disk", "tiny fit"):
        assert f"\n  {name}" in said
    assert "pip install 'lora_lightning[" in said or "would add" not in said


def test_the_findings_as_json(monkeypatch, capsys):
    command(monkeypatch, "doctor", "--json", "--fit", "false")
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    by_name = {finding["name"]: finding for finding in told["findings"]}
    # A package index's wheel says 2.9.0 of a torch that calls itself 2.9.0+cu128.
    assert Version(by_name["torch"]["said"]).public == Version(torch.__version__).public
    assert "tiny fit" not in by_name


def test_an_extra_that_lacks_a_package_says_what_it_would_add_and_how(monkeypatch):
    there = doctors.installed_version
    monkeypatch.setattr(doctors, "installed_version", lambda name: None if name == "matplotlib" else there(name))
    (finding,) = [one for one in doctors.extras() if one.name == "plots"]
    assert finding.said == ("would add the figures of analyze (lacks matplotlib): pip install 'lora_lightning[plots]'")
    assert finding.ok, "no run needs it"


def test_a_package_that_every_run_needs_fails(monkeypatch, capsys):
    there = doctors.installed_version
    monkeypatch.setattr(doctors, "installed_version", lambda name: None if name == "torch" else there(name))
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "doctor", "--fit", "false")
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "does not work: torch"


def test_a_folder_of_runs_that_is_a_file_fails(tmp_path):
    (tmp_path / "runs").write_text("")
    (disk,) = [one for one in doctors.surroundings(tmp_path / "runs") if one.name == "disk"]
    assert not disk.ok


def test_a_fit_that_fails_is_told_with_its_reason(monkeypatch):
    def fails():
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("lora_lightning.commands.tiny_fit.tiny_fit", fails)
    finding = doctors.trial()
    assert not finding.ok
    assert finding.said == "RuntimeError: no kernel image is available"


def test_the_tiny_fit_learns_and_its_export_is_the_same(capsys, tmp_path):
    figures = tiny_fit()
    assert figures.after < figures.before / 2
    assert figures.apart < 1e-4
    assert capsys.readouterr().out == ""
    assert not list(Path(tmp_path).iterdir()), "it leaves nothing here"
