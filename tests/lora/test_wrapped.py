"""A model or a block that is compiled, in DataParallel or recomputed goes by the plain model's names, in files too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_lightning import AdapterBank, LoRAConfig, LoRAError, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import (
    adapter_tensors,
    base_tensors,
    frozen_keys,
    get_module,
    named_modules,
    plain_name,
)
from lora_lightning.lora.inject import adapted_layers
from tests.factories import distance, llama, move, output
from tests.lora.directories import same_files

pytestmark = pytest.mark.filterwarnings("ignore::lora_lightning.lora.errors.AdapterWarning")
X = torch.randn(3, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 8)  # a name that DataParallel uses too
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(self.module(x).relu())


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


WRAPS = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "recomputed": checkpoint_wrapper,
    "both": lambda block: nn.DataParallel(compiled(block)),
}
WHOLE = {"whole": nn.DataParallel, "whole, compiled": compiled}


def build(wrap=None):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.LayerNorm(8)).eval()
    if wrap in WRAPS:
        model[0] = WRAPS[wrap](model[0])
    return WHOLE[wrap](model) if wrap in WHOLE else model


OPTIONS = {
    "plain": {"target_modules": ["module", "out"]},
    "full name": {"target_modules": r"0\.out", "rank_pattern": {r"^0\.out$": 3}},
    "head and biases": {"target_modules": ["0.module"], "modules_to_save": ["1.out"], "bias": "all"},
    "dora": {"use_dora": True},
    "a start": {"target_modules": ["0.out", "1.out"], "init": "pissa"},
    "a parameter": {"target_modules": ["1.out"], "target_parameters": ["0.out.weight"]},
}


IN_TURN = [(w, o) for i, w in enumerate([*WRAPS, *WHOLE]) for j, o in enumerate(OPTIONS) if (i + j) % 2 == 0]


@pytest.mark.parametrize(("wrap", "option"), IN_TURN)
def test_a_wrapped_model_has_the_plain_ones_names_and_files_and_loads_both(wrap, option, tmp_path):
    plain, own = build(), build(wrap)
    for model, name in ((plain, "plain"), (own, "own")):
        torch.manual_seed(1)
        inject(model, LoRAConfig(r=2, **OPTIONS[option]))
        save_adapter(move(model), tmp_path / name)
    for names in (adapter_tensors, base_tensors, lambda m: dict(adapted_layers(m)), lambda m: dict(named_modules(m))):
        assert list(names(own)) == list(names(plain))
    assert frozen_keys(own) == frozen_keys(plain)
    assert fingerprint(own) == fingerprint(plain)
    assert all(get_module(own, name) is module for name, module in named_modules(own))
    assert wrap != "whole" or plain_name(own, "module.0.module.weight") == "0.module.weight"
    assert same_files(tmp_path / "own", tmp_path / "plain")
    for again, directory in ((build(), "own"), (build(wrap), "plain")):
        assert distance(again(X), plain(X)) > 1e-3  # and a graph that is compiled here takes up what is loaded
        load_adapter(again, tmp_path / directory)
        assert distance(again(X), plain(X)) < 1e-6  # a compiled block, or an init as twice the rank, rounds otherwise
    merge(own)
    assert distance(own(X), plain(X)) < 1e-5


def test_save_pretrained_and_a_resize_of_a_trained_head_are_refused_until_the_model_is_plain(tmp_path):
    model, again, tokens = llama().eval(), llama().eval(), torch.arange(1, 7)[None]
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for call in (model.save_pretrained, model.model.save_pretrained, model.resize_token_embeddings):
        with pytest.raises(LoRAError, match=r"stray .*save_adapter\(model, .*merge\(model\)|resize the plain model"):
            call(tmp_path / "x")  # a part would write the same stray keys
    assert not (tmp_path / "x").exists()
    adapter, wanted = save_adapter(move(model), tmp_path / "adapter"), output(model, tokens)
    merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert distance(output(type(model).from_pretrained(tmp_path / "merged"), tokens), wanted) < 1e-5
    bank = AdapterBank(again)
    bank.load("a", adapter, allow_other_base=True)
    bank.activate("a")
    with pytest.raises(LoRAError):
        again.save_pretrained(tmp_path / "x")
    bank.activate(None)
    again.save_pretrained(tmp_path / "plain")
