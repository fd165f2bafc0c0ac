"""Names that are the dotted end of others: a setting of one must not reach the other, here or in PEFT."""

import itertools

import peft
import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, save_adapter
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from lora_lightning.lora.layers import SavedCopy
from tests.factories import Own
from tests.lora.kinds import shake


def linear(size, **options):
    return nn.Linear(size, size, dtype=torch.float64, **options)


class Chain(nn.Module):
    """`m.e.x`, `e.x` and `x`, each name the end of the one before."""

    def __init__(self):
        super().__init__()
        self.m, self.e = nn.ModuleDict({"e": nn.ModuleDict({"x": linear(6)})}), nn.ModuleDict({"x": linear(6)})
        self.x = linear(6)

    def forward(self, x):
        return self.x(self.e["x"](self.m["e"]["x"](x)))


class Named(nn.Module):
    """Modules that are called as PEFT's wrappers are, or nearly so."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Sequential(linear(4), linear(4))
        self.original_module, self.modules_to_save = nn.ModuleDict({"q": linear(4)}), nn.ModuleDict({"q": linear(4)})
        self.enc = nn.ModuleDict({"base_layers": linear(4), "base_layer": linear(4)})
        self.encs, self.table = nn.ModuleList([linear(4)]), nn.ModuleDict({"base_layer": nn.Embedding(5, 4)})

    def forward(self, ids):
        x = self.table["base_layer"](ids)
        parts = (self.base_layer, self.original_module.values(), self.modules_to_save.values(), self.enc.values())
        for layer in (*itertools.chain(*parts), *self.encs):
            x = x + layer(x)
        return x


BLOCK = "sparse_mixture_of_experts_of_this_decoder_layer"


class Many(nn.Module):
    """Experts by long names, once inside and once in full."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.block(5) for _ in range(6)])
        self.model = nn.ModuleDict({"layers": nn.ModuleList([self.block(1)])})

    def block(self, experts):
        experts = [nn.ModuleDict({"down_projection": linear(2, bias=False)}) for _ in range(experts)]
        return nn.ModuleDict({BLOCK: nn.ModuleList(experts)})

    def forward(self, x):
        for layer in (*self.layers, *self.model["layers"]):
            for expert in layer[BLOCK]:
                x = x + 0.01 * expert["down_projection"](x)
        return x


def build(make):
    torch.manual_seed(0)
    return make().double().eval()


def input_of(make):
    shape = {Chain: (3, 6), Many: (3, 2), Own: (2, 8)}.get(make)
    return torch.tensor([[0, 3, 1], [2, 4, 1]]) if shape is None else torch.randn(shape, dtype=torch.float64)


NAMED = ["base_layer.0", "enc.base_layers", "enc.base_layer", "table.base_layer"]
REGEX = {"target_modules": ["inner.a+b (c)", "inner.a", "second"], "rank_pattern": {"inner.a+b (c)": 3}}
OPTIONS = [
    (Chain, {"target_modules": ["x"], "rank_pattern": {"^x$": 3}}),
    (Chain, {"target_modules": ["x"], "alpha_pattern": {"^x$": 3.0}}),
    (Chain, {"target_modules": ["x"], "dropout_pattern": {"^x$": 0.5}, "alpha_pattern": {r"^e\.x": 5.0}}),
    (Chain, {"target_modules": ["x"], "slices": {"^x$": {"of": ["q", "k"], "take": ["k"]}}}),
    (Chain, {"target_modules": ["e.x"], "modules_to_save": ["x"]}),
    (Chain, {"target_modules": r"x|m\.e\.x"}),
    (Own, {**REGEX, "alpha_pattern": {"inner.a+b (c)": 7}}),
    *((Named, {"target_modules": [name]}) for name in [*NAMED, "original_module.q", "modules_to_save.q"]),
    (Named, {"target_modules": NAMED, "bias": "lora_only"}),
    (Named, {"target_modules": ["base_layer.0"], "bias": "all"}),
    (Named, {"target_modules": ["encs.0"], "bias": "lora_only", "modules_to_save": ["enc.base_layer"]}),
    (Named, {"target_modules": ["encs.0"], "trainable_token_indices": {"table.base_layer": [1, 3]}}),
    (Named, {"target_modules": ["encs.0"], "target_parameters": ["enc.base_layer.weight"]}),
    (Many, {"target_modules": r"layers\..*down_projection"}),
]
PEFT_TOO = (r"x|m\.e\.x", r"layers\..*down_projection")


@pytest.mark.filterwarnings("ignore:PEFT")
@pytest.mark.parametrize(("make", "options"), OPTIONS, ids=str)
def test_settings_of_a_name_that_ends_another_stay_its_own(make, options, tmp_path):
    model, again, x = build(make), build(make), input_of(make)
    inject(model, LoRAConfig(**{"r": 1 if make is Many else 2, "alpha": 7, **options}))
    load_adapter(again, save_adapter(shake(model), tmp_path))
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert not torch.equal(model(x), build(make)(x))
    settings = [{name: layer.lora_settings for name, layer in adapted_layers(m)} for m in (again, model)]
    assert settings[0] == settings[1]
    if make is Own:
        assert {name: s.r for name, s in settings[0].items()} == {"inner.a+b (c)": 3, "inner.a": 2, "second": 2}
    saved = [name for name, _ in grafted_modules(again, SavedCopy)]
    assert saved == options.get("modules_to_save", []), "a full name means that module alone"
    if options["target_modules"] in PEFT_TOO:
        theirs = peft.PeftModel.from_pretrained(build(make), tmp_path)
        assert torch.allclose(theirs(x), model(x), rtol=1e-12)
