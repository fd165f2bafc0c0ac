"""Names that are the dotted end of others: a setting of one must not reach the other."""

import peft
import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, save_adapter
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import SavedCopy
from tests.lora.kinds import shake


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
    assert [name for name, _ in grafted_modules(model, SavedCopy)] == ["x"]
    save_adapter(shake(model), tmp_path)
    again = nested()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_an_end_of_several_names_in_modules_to_save_is_refused():
    model = nn.ModuleDict({"a": Nested(), "b": nn.Linear(2, 2)})
    with pytest.raises(TargetError, match=r"'x' is the end of several names: write in full 'a\.inner\.x', 'a\.x'"):
        inject(model, LoRAConfig(r=2, target_modules=["b"], modules_to_save=["x"]))


class Named(nn.Module):
    """Modules that are called as PEFT's wrappers are, or nearly so."""

    def __init__(self):
        super().__init__()
        kind = {"in_features": 4, "out_features": 4}
        self.base_layer = nn.Sequential(nn.Linear(**kind), nn.Linear(**kind))
        self.base_layer_2, self.original_module = nn.Linear(**kind), nn.Module()
        self.original_module.q, self.modules_to_save = nn.Linear(**kind), nn.ModuleDict({"q": nn.Linear(**kind)})
        self.enc = nn.ModuleDict({"base_layers": nn.ModuleList([nn.Linear(**kind)]), "base_layer": nn.Linear(**kind)})
        self.encs, self.mha = nn.ModuleList([nn.Linear(**kind)]), nn.Module()
        self.mha.base_layer = nn.MultiheadAttention(4, 1, batch_first=True)
        self.table = nn.ModuleDict({"base_layer": nn.Embedding(5, 4)})

    def forward(self, ids):
        x = self.table["base_layer"](ids)
        for layer in (*self.base_layer, self.base_layer_2, self.original_module.q, self.modules_to_save["q"]):
            x = x + layer(x)
        x = x + self.encs[0](self.enc["base_layers"][0](x)) + self.enc["base_layer"](x)
        return x + self.mha.base_layer(x, x, x, need_weights=False)[0]


def named():
    torch.manual_seed(0)
    return Named().double().eval()


NAMED = ["base_layer.0", "base_layer_2", "enc.base_layers.0", "enc.base_layer", "table.base_layer"]


@pytest.mark.parametrize(
    "options",
    [
        *({"target_modules": [name]} for name in [*NAMED, "mha.base_layer", "original_module.q", "modules_to_save.q"]),
        {"target_modules": NAMED, "bias": "lora_only"},
        {"target_modules": ["base_layer.0"], "bias": "all"},
        {"target_modules": ["encs.0"], "bias": "lora_only", "modules_to_save": ["enc.base_layer"]},
        {"target_modules": ["encs.0"], "trainable_token_indices": {"table.base_layer": [1, 3]}},
        {"target_modules": ["encs.0"], "target_parameters": ["enc.base_layer.weight"]},
    ],
    ids=str,
)
def test_modules_that_are_named_as_pefts_wrappers_load_as_they_were_saved(options, tmp_path):
    model, ids = named(), torch.tensor([[0, 3, 1], [2, 4, 1]])
    inject(model, LoRAConfig(r=2, **options))
    save_adapter(shake(model), tmp_path)
    again = named()
    load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(ids), model.eval()(ids))
    assert not torch.equal(model(ids), named()(ids))


@pytest.mark.parametrize("targets", [["base_layer_2"], ["enc.base_layers.0", "encs.0"], ["original_module.q"]], ids=str)
def test_a_directory_of_pefts_for_such_modules_loads_as_what_it_says(targets, tmp_path):
    ids = torch.tensor([[0, 3, 1], [2, 4, 1]])
    theirs = peft.get_peft_model(
        named(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, bias="lora_only")
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = named()
    with pytest.warns(UserWarning, match="no fingerprint"):
        load_adapter(ours, tmp_path)
    assert torch.allclose(ours(ids), theirs(ids), rtol=1e-12, atol=1e-12)


class Many(nn.Module):
    """Experts by long names, once inside and once in full."""

    def __init__(self, blocks=6, experts=5):
        super().__init__()
        self.layers = nn.ModuleList([self.block(experts) for _ in range(blocks)])
        self.model = nn.ModuleDict({"layers": nn.ModuleList([self.block(1)])})

    def block(self, experts):
        kind = {"in_features": 2, "out_features": 2, "bias": False, "dtype": torch.float64}
        return nn.ModuleDict(
            {
                "sparse_mixture_of_experts_of_this_decoder_layer": nn.ModuleList(
                    [nn.ModuleDict({"down_projection": nn.Linear(**kind)}) for _ in range(experts)]
                )
            }
        )

    def forward(self, x):
        for layer in (*self.layers, *self.model["layers"]):
            for expert in layer["sparse_mixture_of_experts_of_this_decoder_layer"]:
                x = x + 0.01 * expert["down_projection"](x)
        return x


def many():
    torch.manual_seed(0)
    return Many()


def test_names_without_number_that_end_another_are_told_apart_by_us_and_by_peft(tmp_path):
    model, x = many(), torch.randn(3, 2, dtype=torch.float64)
    inject(model, LoRAConfig(r=1, target_modules=r"layers\..*down_projection"))
    save_adapter(shake(model), tmp_path)
    count = sum(name.startswith("layers.") and name.endswith("down_projection") for name, _ in many().named_modules())
    assert count == 30
    again = many()
    assert len(load_adapter(again, tmp_path).modules) == count
    assert torch.equal(again(x), model(x))
    theirs = peft.PeftModel.from_pretrained(many(), tmp_path)
    assert torch.allclose(theirs(x), model(x), rtol=1e-12)


class Crossed(nn.Module):
    """`e.x` ends in the adapted `x`, and the adapted `m.e.x` in it."""

    def __init__(self):
        super().__init__()
        kind = {"in_features": 3, "out_features": 3, "dtype": torch.float64}
        self.x, self.e = nn.Linear(**kind), nn.ModuleDict({"x": nn.Linear(**kind)})
        self.m = nn.ModuleDict({"e": nn.ModuleDict({"x": nn.Linear(**kind)})})

    def forward(self, x):
        return self.x(self.e["x"](self.m["e"]["x"](x)))


def test_names_that_end_one_another_both_ways_are_told_apart(tmp_path):
    def make():
        torch.manual_seed(0)
        return Crossed()

    model, x = make(), torch.randn(2, 3, dtype=torch.float64)
    inject(model, LoRAConfig(r=1, target_modules=r"x|m\.e\.x"))
    save_adapter(shake(model), tmp_path)
    again = make()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.allclose(theirs(x), model(x), rtol=1e-12)
