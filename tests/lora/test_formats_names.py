"""Names that are the dotted end of others: a setting of one must not reach the other."""

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, save_adapter
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.inject import saved_copies
from tests.lora.options_support import shake


class Nested(nn.Module):
    """`inner.x` and `x`, in that order."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"x": nn.Linear(6, 6, dtype=torch.float64)})
        self.x = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x):
        return self.x(self.inner["x"](x))


def nested():
    torch.manual_seed(0)
    return Nested()


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"^x$": 3}},
        {"alpha_pattern": {"^x$": 3.0}},
        {"dropout_pattern": {"^x$": 0.5}, "alpha_pattern": {r"inner\.x": 5.0}},
    ],
    ids=str,
)
def test_settings_of_a_name_that_ends_another_stay_its_own(options, tmp_path):
    model, x = nested(), torch.randn(3, 6, dtype=torch.float64)
    inject(model, LoRAConfig(r=2, alpha=7, target_modules=["x"], **options))
    save_adapter(shake(model), tmp_path)
    again = nested()
    load_adapter(again, tmp_path)
    assert again.x.lora_settings == model.x.lora_settings
    assert again.inner.x.lora_settings == model.inner.x.lora_settings
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_full_name_in_modules_to_save_means_that_module_alone(tmp_path):
    model, x = nested(), torch.randn(3, 6, dtype=torch.float64)
    inject(model, LoRAConfig(r=2, target_modules=["inner.x"], modules_to_save=["x"]))
    assert [name for name, _ in saved_copies(model)] == ["x"]
    save_adapter(shake(model), tmp_path)
    again = nested()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_an_end_of_several_names_in_modules_to_save_is_refused():
    model = nn.ModuleDict({"a": Nested(), "b": nn.Linear(2, 2)})
    with pytest.raises(TargetError, match=r"'x' is the end of several names: write in full 'a\.inner\.x', 'a\.x'"):
        inject(model, LoRAConfig(r=2, target_modules=["b"], modules_to_save=["x"]))
