"""The first screen of a fit, its bar, and what is kept off both."""

from __future__ import annotations

import io
import logging
import warnings

import pytest
from rich.console import Console
from torch import nn

from lora_lightning import LoRAConfig, inject
from lora_lightning.cli.log_filters import RECORDS, silence_others
from lora_lightning.reports.console import show_injection


def console_of(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, record=True)


@pytest.mark.parametrize("kinds", [1, 8, 40])
def test_the_first_screen_shows_every_row_the_head_among_them(kinds: int) -> None:
    names = [f"projection_{i}" for i in range(kinds)]
    layers = [nn.ModuleDict({n: nn.Linear(4, 4 + i) for i, n in enumerate(names)}) for _ in range(3)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(layers), "head": nn.Linear(4, 2)})
    console, given = console_of(80), {"target_modules": r"blocks.+\.projection_\d+", "modules_to_save": ["head"]}
    show_injection(inject(model, LoRAConfig(r=2, **given)), console)
    header, *rows, total = (line.split() for line in console.export_text().rstrip("\n").splitlines())
    assert header[0] == "module"
    assert [row[0] for row in rows] == [*(f"blocks.*.{name}" for name in names), "head"]
    assert [row[1] for row in rows] == ["3"] * kinds + ["1"]
    trained = sum(3 * (4 * 2 + 2 * (4 + i)) for i in range(kinds)) + 10
    assert total[0] == f"{trained:,}"
    assert sum(int(row[-1].replace(",", "")) for row in rows) == trained


def test_what_can_be_acted_on_is_not_filtered(caplog, monkeypatch) -> None:
    """In a process's loggers and warnings as `silence_others` leaves them."""
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    for name in RECORDS:
        monkeypatch.setattr(logging.getLogger(name), "filters", list(logging.getLogger(name).filters))
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        silence_others()
        for text in ("GPU available: False, used: False", "Tip: litlogger", "`Trainer.fit` stopped: `max_epochs`"):
            rank_zero.info(text)
        logging.getLogger("torchao").warning("Failed to load /x/_C.so: no")
        logging.getLogger("torchao").warning("Skipping import of cpp extensions")
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck", stacklevel=1)
        warnings.warn("GPU available but not used", stacklevel=1)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["`Trainer.fit` stopped: `max_epochs`", "Skipping import of cpp extensions"]
    assert [str(w.message) for w in warned] == ["GPU available but not used"]
