"""Sweeps over `stand_in.py`, which fits nothing, to see what a sweep itself does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from jsonargparse import Namespace
from torch import nn

from lora_lightning.commands.sweep.base_config import Base
from lora_lightning.commands.sweep.command import run_sweep
from lora_lightning.commands.sweep.sweep import Request, Sweep

COMMAND = (sys.executable, str(Path(__file__).with_name("stand_in.py")))


def plan(folder, **changes):
    """The file that stands for the config."""
    content = {"validations": 1, "pause": 0.0, "level": {}, "events": str(folder / "events.jsonl"), **changes}
    file = folder / "plan.json"
    file.write_text(json.dumps(content))
    return file


def base(**config):
    """With a parser that refuses nothing."""
    parsed = SimpleNamespace(fit=SimpleNamespace(model=SimpleNamespace(lora=Namespace())))
    return Base(
        name="quick",
        config={"model": {"lora": {"alpha": None}}, **config},
        backbone=nn.Linear(2, 2),
        metric="val/accuracy",
        goal="max",
        why_unlogged=lambda metric: None,
        parser=SimpleNamespace(parse_args=lambda args: parsed),
    )


def sweep(file, *, grid=("model.lora.r=1,2,4",), config=None, **asked):
    """One over a plan, in the current folder."""
    request = Request(fit=[str(file)], grid=list(grid), plots=False, **asked)
    return Sweep(request, base(**(config or {})))


def run(*args, **kwargs):
    """A sweep to its end: what it came to, and what it said of each trial, in order."""
    said = []
    made = sweep(*args, **kwargs)
    points = run_sweep(made, lambda t, what: said.append((what, t.values["model.lora.r"], t.state)), command=COMMAND)
    return SimpleNamespace(folder=made.folder, points=points), said


def events(folder, what=None):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if what in (None, event["what"])]


def placed(outcome):
    """r of each complete point, the best first."""
    return [int(point.values["model.lora.r"]) for point in outcome.points if point.state == "complete"]
