"""Names that are the dotted end of others: a setting of one must not reach the other, here or in PEFT."""

import peft
import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, save_adapter
from lora_lightning.lora.inject import adapted_layers, modules_of_kind
from lora_lightning.lora.layers import SavedCopy
from tests.factories import Own
from tests.lora.kinds import shake


class Summed(nn.Module):
    """Sums what the layers of these names give; the rows are those of a table, if there is one."""

    def __init__(self, names, size, table=None):
        super().__init__()
        self.names, self.rows = names, table
        for name in [*names, *([table] if table else [])]:
            owner = self
            *path, end = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(end, nn.Embedding(5, size) if name == table else nn.Linear(size, size))

    def forward(self, x):
        x = self.get_submodule(self.rows)(x) if self.rows else x
        return x + 0.01 * sum(self.get_submodule(name)(x) for name in self.names)


def chain():
    """Each name is the end of the one before."""
    return Summed(["m.e.x", "e.x", "x"], 6)


def named():
    """Modules that are called as PEFT's wrappers are, or nearly so."""
    ends = ["base_layer.0", "base_layer.1", "original_module.q", "modules_to_save.q", "enc.base_layers"]
    return Summed([*ends, "enc.base_layer", "encs.0"], 4, "table.base_layer")


def many():
    """Experts by long names, once inside and once in full."""
    of = "sparse_mixture_of_experts_of_this_decoder_layer"
    names = [f"layers.{layer}.{of}.{expert}.down_projection" for layer in range(6) for expert in range(5)]
    return Summed([*names, f"model.layers.0.{of}.0.down_projection"], 2)


def build(make):
    torch.manual_seed(0)
    return make().double().eval()


def input_of(make):
    shape = {chain: (3, 6), many: (3, 2), Own: (2, 8)}.get(make)
    return torch.tensor([[0, 3, 1], [2, 4, 1]]) if shape is None else torch.randn(shape, dtype=torch.float64)


NAMED = ["base_layer.0", "enc.base_layers", "enc.base_layer", "table.base_layer"]
REGEX = {"target_modules": ["inner.a+b (c)", "inner.a", "second"], "rank_pattern": {"inner.a+b (c)": 3}}
OPTIONS = [
    (chain, {"target_modules": ["x"], "rank_pattern": {"^x$": 3}}),
    (chain, {"target_modules": ["x"], "alpha_pattern": {"^x$": 3.0}}),
    (chain, {"target_modules": ["x"], "dropout_pattern": {"^x$": 0.5}, "alpha_pattern": {r"^e\.x": 5.0}}),
    (chain, {"target_modules": ["x"], "slices": {"^x$": {"of": ["q", "k"], "take": ["k"]}}}),
    (chain, {"target_modules": ["e.x"], "modules_to_save": ["x"]}),
    (chain, {"target_modules": r"x|m\.e\.x"}),
    (Own, {**REGEX, "alpha_pattern": {"inner.a+b (c)": 7}}),
    *((named, {"target_modules": [name]}) for name in [*NAMED, "original_module.q", "modules_to_save.q"]),
    (named, {"target_modules": NAMED, "bias": "lora_only"}),
    (named, {"target_modules": ["base_layer.0"], "bias": "all"}),
    (named, {"target_modules": ["encs.0"], "bias": "lora_only", "modules_to_save": ["enc.base_layer"]}),
    (named, {"target_modules": ["encs.0"], "trainable_token_indices": {"table.base_layer": [1, 3]}}),
    (named, {"target_modules": ["encs.0"], "target_parameters": ["enc.base_layer.weight"]}),
    (many, {"target_modules": r"layers\..*down_projection"}),
]
PEFT_TOO = (r"x|m\.e\.x", r"layers\..*down_projection")


@pytest.mark.filterwarnings("ignore:PEFT")
@pytest.mark.parametrize(("make", "options"), OPTIONS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_settings_of_a_name_that_ends_another_stay_its_own(make, options, tmp_path):
    model, again, x = build(make), build(make), input_of(make)
    inject(model, LoRAConfig(**{"r": 1 if make is many else 2, "alpha": 7, **options}))
    load_adapter(again, save_adapter(shake(model), tmp_path))
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert not torch.equal(model(x), build(make)(x))
    settings = [{name: layer.lora_settings for name, layer in adapted_layers(m)} for m in (again, model)]
    assert settings[0] == settings[1]
    if make is Own:
        assert {name: s.r for name, s in settings[0].items()} == {"inner.a+b (c)": 3, "inner.a": 2, "second": 2}
    saved = [name for name, _ in modules_of_kind(again, SavedCopy)]
    assert saved == options.get("modules_to_save", []), "a full name means that module alone"
    if options["target_modules"] in PEFT_TOO:
        theirs = peft.PeftModel.from_pretrained(build(make), tmp_path)
        assert torch.allclose(theirs(x), model(x), rtol=1e-12)
