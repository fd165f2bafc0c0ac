"""The first screen of a fit, its bar, and what is kept off both."""

from __future__ import annotations

import io
import logging
import re
import warnings
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import nn

from lora_lightning import LoRAConfig, Progress, inject
from lora_lightning.cli.log_filters import RECORDS, silence_others
from lora_lightning.reports.console import first_lines, short_count, show_injection, show_lines


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


def test_the_first_lines_name_backbone_size_device_precision_and_place(tmp_path, make_module) -> None:
    module = make_module()
    trainer = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path, name="a [run]"), barebones=False)
    first, second = first_lines(trainer, module.backbone, module.report, tmp_path / "a [run]" / "version_0")
    assert re.fullmatch(r"BertForSequenceClassification \(\w+/bert\), 20\.2K frozen parameters", first)
    assert second == f"on cpu in 32-true; results go to {tmp_path}/a [run]/version_0"
    show_lines([first, second], console := console_of(40))
    assert console.export_text() == f"{first}\n{second}\n", "brackets are no markup, and paths can be copied"


def test_sizes_are_said_as_people_say_them() -> None:
    said = {0: "0", 999: "999", 1500: "1.5K", 22_713_986: "22.7M", 999_999: "1M", 7_000_000_000: "7B"}
    assert {number: short_count(number) for number in said} == said


def test_the_bar_has_the_loss_and_one_rate(make_module) -> None:
    figures = {"v_num": 3, "train/loss_step": 0.123456, "samples/s": 12.5, "tokens/s": 1234.5, "mine": 2.0}
    bar, trainer = Progress(), SimpleNamespace(progress_bar_metrics=figures, loggers=[])
    assert bar.get_metrics(trainer, make_module()) == {"loss": "0.1235", "tokens/s": "1,234", "mine": "2"}
    del figures["tokens/s"]
    assert bar.get_metrics(trainer, make_module()) == {"loss": "0.1235", "samples/s": "12.5", "mine": "2"}


def test_what_can_be_acted_on_is_not_filtered(caplog) -> None:
    """In a process's loggers and warnings as `silence_others` leaves them."""
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = {name: list(logging.getLogger(name).filters) for name in RECORDS}
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        try:
            silence_others()
            for text in ("GPU available: False, used: False", "Tip: litlogger", "`Trainer.fit` stopped: `max_epochs`"):
                rank_zero.info(text)
            logging.getLogger("torchao").warning("Failed to load /x/_C.so: no")
            logging.getLogger("torchao").warning("Skipping import of cpp extensions")
            warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck", stacklevel=1)
            warnings.warn("GPU available but not used", stacklevel=1)
            warnings.warn("The number of training batches (6) is smaller than the logging interval", stacklevel=1)
        finally:
            for name, filters in before.items():
                logging.getLogger(name).filters[:] = filters
    told = [record.getMessage() for record in caplog.records]
    assert told == ["`Trainer.fit` stopped: `max_epochs`", "Skipping import of cpp extensions"]
    assert [str(w.message)[:22] for w in warned] == ["GPU available but not ", "The number of training"]
