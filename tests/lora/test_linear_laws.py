"""The laws of every kind of layer, asked of `nn.Linear`."""

import peft
import pytest
import torch
from torch import nn

from tests.lora.laws import check_laws, check_meta, check_peft_opens_ours, check_we_open_pefts, config, dtypes


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))


def run(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    return model(x.to(next(model.parameters()).dtype))


@dtypes
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_laws(rslora, init, dtype, tmp_path):
    chosen = config(r=3, rank_pattern={"2": 1}, alpha_pattern={"0": 5.0}, use_rslora=rslora, init=init)
    report = check_laws(net, run, chosen, dtype, tmp_path)
    assert [(row.module, row.r) for row in report.modules] == [("0", 3), ("2", 1)]
    assert report.skipped == {"4": "the output head"}


def test_meta():
    check_meta(net, config())


def test_peft_opens_ours_and_we_open_pefts(tmp_path):
    check_peft_opens_ours(net, run, config(), tmp_path)
    check_we_open_pefts(net, run, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"]), tmp_path)
