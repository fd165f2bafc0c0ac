"""docs/moving.md: what it says of PEFT, loralib and transformers is what is installed; of ours, what we do."""

import dataclasses
import inspect
import math
import re

import loralib
import peft
import pytest
import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import TrainingArguments

from lora_lightning import LoRAConfig, LoRAModule, WarmupDecay, inject
from lora_lightning.data.base import TableData
from lora_lightning.data.chat.data import ChatData
from tests.command.process import REPOSITORY

PAGE = (REPOSITORY / "docs" / "moving.md").read_text(encoding="utf-8")


def row(name):
    """The cells of a row of the first table, by column."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    cells = next(line for line in lines if line.startswith(f"| {name} |")).strip("|").split("|")
    return dict(zip(head[1:], [cell.strip() for cell in cells[1:]], strict=True))


def test_pefts_defaults():
    config = peft.LoraConfig()
    assert row("rank")["PEFT"] == str(config.r)
    assert row("alpha")["PEFT"] == str(config.lora_alpha)
    assert row("scale alpha / r")["PEFT"] == str(config.lora_alpha // config.r)
    assert row("LoRA dropout")["PEFT"] == f"{config.lora_dropout:.0f}"
    often = [sorted(names) for names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.values()]
    query_value = (["query", "value"], ["q_proj", "v_proj"], ["q", "v"])
    assert sum(names in query_value for names in often) > len(often) / 2


def test_loralibs_defaults():
    arguments = inspect.signature(loralib.Linear.__init__).parameters
    assert row("rank")["loralib"] == f"{arguments['r'].default}, off"
    assert row("alpha")["loralib"] == str(arguments["lora_alpha"].default)
    assert row("LoRA dropout")["loralib"] == f"{arguments['lora_dropout'].default:.0f}"


def test_our_defaults():
    config = LoRAConfig()
    assert row("rank")["here"] == str(config.r)
    assert row("scale alpha / r")["here"] == f"{config.scale(config.r, config.scaling_alpha):.0f}"
    assert row("LoRA dropout")["here"] == f"{config.dropout:.0f}"
    assert config.target_modules == "all-linear"
    assert inspect.signature(LoRAModule.__init__).parameters["backbone_mode"].default == "eval"


def drawn(make):
    torch.manual_seed(0)
    return make().detach()


@pytest.mark.parametrize("wide", [64, 1024])
def test_how_a_starts(wide):
    """Uniform in +-1/sqrt(in) for PEFT, loralib and our kaiming; a Gaussian of sqrt(3) times the spread by default."""
    theirs = drawn(lambda: peft.get_peft_model(
        nn.Sequential(nn.Linear(wide, wide)), peft.LoraConfig(r=64, target_modules=["0"])
    ).base_model.model[0].lora_A["default"].weight)  # fmt: skip
    bound = 1 / math.sqrt(wide)

    def ours(init):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(wide, wide))
        inject(model, LoRAConfig(r=64, init=init))
        return model[0].lora_A.detach()

    for uniform in (theirs, drawn(lambda: loralib.Linear(wide, wide, r=64).lora_A), ours("kaiming")):
        assert 0.95 * bound < uniform.abs().max() <= bound
    assert float(ours("gaussian").std() / theirs.std()) == pytest.approx(math.sqrt(3), rel=0.1)


def test_the_trainers_defaults():
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, shown in {
        "learning_rate": "5e-5", "weight_decay": "0", "max_grad_norm": "1.0", "per_device_train_batch_size": "8",
        "num_train_epochs": "3", "warmup_steps": "0",
    }.items():  # fmt: skip
        assert float(theirs[name]) == float(shown)
        assert re.search(rf"`{name}` {re.escape(shown)}\b", PAGE), name
    assert theirs["lr_scheduler_type"] == "linear"


def test_our_side_of_the_trainers_table():
    assert inspect.signature(TableData.__init__).parameters["batch_size"].default == 32
    assert inspect.signature(ChatData.__init__).parameters["batch_size"].default == 8
    assert inspect.signature(torch.optim.AdamW.__init__).parameters["weight_decay"].default == 0.01
    schedule = inspect.signature(WarmupDecay.__init__).parameters
    assert (schedule["warmup"].default, schedule["decay"].default) == (0.06, "linear")
