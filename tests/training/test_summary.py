"""The first screen of a fit."""

from __future__ import annotations

import io

from rich.console import Console
from torch import nn

from lora_lightning import LoRAConfig, inject
from lora_lightning.training.summary import show_injection


def shown(model: nn.Module, **options: object) -> str:
    report = inject(model, LoRAConfig(r=2, target_modules=".+", **options))  # type: ignore[arg-type]
    console = Console(file=io.StringIO(), width=80, record=True)
    show_injection(report, console)
    return console.export_text()


def test_the_first_screen_says_in_one_line_what_goes_the_plain_way() -> None:
    text = shown(nn.ModuleDict({"tokens": nn.Embedding(9, 4, max_norm=1.0), "head": nn.Linear(4, 4)}))
    assert "plain arithmetic in 1 of 2 layers: max_norm bounds each row (1)" in text
    assert any(line.split()[:2] == ["tokens", "1"] and "plain" in line.split() for line in text.splitlines())


def test_the_first_screen_does_not_speak_of_it_where_all_goes_quick() -> None:
    text = shown(nn.ModuleDict({"tokens": nn.Embedding(9, 4), "head": nn.Linear(4, 4)}), use_dora=False)
    assert "plain" not in text
    assert "way" not in text.splitlines()[1].split()
