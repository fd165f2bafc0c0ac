"""An adapter's files are the plain model's, whatever wraps the model or its blocks."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

from lora_lightning import (
    AdapterBank,
    LoRAConfig,
    LoRAError,
    inject,
    load_adapter,
    load_loralib,
    merge,
    remove,
    save_adapter,
)
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.init.from_adapter import start_from_directory
from tests.factories import assert_same, distance, llama, move, output, snapshot
from tests.lora.test_wrapped import WRAPS, Block

pytestmark = pytest.mark.filterwarnings("ignore::lora_lightning.lora.errors.AdapterWarning")
X = torch.randn(3, 8)
OPTIONS = {
    "plain": {"target_modules": ["module", "out"]},
    "full name": {"target_modules": r"0\.out", "rank_pattern": {r"^0\.out$": 3}},
    "head and biases": {"target_modules": ["0.module"], "modules_to_save": ["1.out"], "bias": "all"},
    "a start": {"target_modules": ["0.out", "1.out"], "init": "pissa"},
    "a parameter": {"target_modules": ["1.out"], "target_parameters": ["0.out.weight"]},
}


def build(wrap=None):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.LayerNorm(8)).eval()
    if wrap in WRAPS:
        model[0] = WRAPS[wrap](model[0])
    elif wrap:
        model = {"whole, compiled": lambda m: torch.compile(m, backend="eager"), "whole": nn.DataParallel}[wrap](model)
    return model


@pytest.mark.parametrize("wrap", [*WRAPS, "whole", "whole, compiled"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_files_of_a_wrapped_model_are_those_of_the_plain_one_and_load_in_both(wrap, options, tmp_path):
    plain, own = build(), build(wrap)
    for model, name in ((plain, "plain"), (own, "own")):
        torch.manual_seed(1)
        inject(model, LoRAConfig(r=2, **options))
        save_adapter(move(model), tmp_path / name)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    for again, directory in ((build(), "own"), (build(wrap), "plain")):
        load_adapter(again, tmp_path / directory)
        assert distance(again(X), plain(X)) < 1e-6  # a compiled block, or an init as twice the rank, rounds otherwise


@pytest.mark.parametrize("wrap", WRAPS)
def test_peft_opens_what_a_wrapped_model_saved(wrap, tmp_path):
    model = build(wrap)
    inject(model, LoRAConfig(r=2, target_modules=["0.out", "1.module"]))
    save_adapter(move(model), tmp_path)
    assert distance(peft.PeftModel.from_pretrained(build(), tmp_path)(X), model(X)) < 1e-6


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_model_starts_from_a_plain_directory_and_takes_loralibs_file(wrap, tmp_path):
    first, second = build(), build(wrap)
    for model in (first, second):
        inject(model, LoRAConfig(r=2, target_modules=["0.out"]))
    start_from_directory(second, save_adapter(move(first), tmp_path / "a"))
    assert torch.equal(second(X), first(X))
    state = {"0.out.lora_A": first[0].out.lora_A.detach(), "0.out.lora_B": first[0].out.lora_B.detach()}
    torch.save(state, tmp_path / "x.pt")
    third = build(wrap)
    load_loralib(third, tmp_path / "x.pt", r=2, alpha=first[0].out.lora_settings.alpha)
    assert torch.equal(third(X), first(X))


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_model_that_is_another_base_is_refused_by_plain_names(wrap, tmp_path):
    model, other = build(), build(wrap)
    inject(model, LoRAConfig(r=2, target_modules=["0.out"]))
    save_adapter(move(model), tmp_path)
    with torch.no_grad():
        next(other[0].parameters())[0, 0] += 1
    before = snapshot(other)
    with pytest.raises(AdapterError, match=r"another base.* 1 of \d+ tensors differ, first 0\.module\.weight"):
        load_adapter(other, tmp_path)
    assert_same(other, before)


# ---- transformers' own way to save


def test_save_pretrained_of_an_adapted_model_is_refused_with_the_line_to_call_until_it_is_plain(tmp_path):
    model, tokens = llama().eval(), torch.arange(1, 7)[None]
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    for part in (model, model.model):  # a part would write the same stray keys
        with pytest.raises(LoRAError, match=r"stray lora_ keys.*save_adapter\(model, .*merge\(model\)") as caught:
            part.save_pretrained(tmp_path / "x")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
    adapter = save_adapter(move(model), tmp_path / "adapter")
    wanted = output(model, tokens)
    merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert distance(output(type(model).from_pretrained(tmp_path / "merged"), tokens), wanted) < 1e-5
    again = llama().eval()
    before = snapshot(again)
    with pytest.raises(AdapterError):
        load_adapter(again, adapter)  # llama() has other numbers each time
    assert_same(again, before)
    load_adapter(again, adapter, allow_other_base=True)
    assert pickle.loads(pickle.dumps(again)).save_pretrained is again.save_pretrained
    remove(again)
    assert_same(again, before, but=("trains",))
    again.save_pretrained(tmp_path / "plain")


def test_save_pretrained_works_while_a_banks_adapters_are_beside_the_model(tmp_path):
    bank = AdapterBank(model := llama().eval())
    bank.load("a", save_adapter(move(adapted_llama(model)), tmp_path / "a"))
    bank.activate("a")
    with pytest.raises(LoRAError, match="save_adapter"):
        model.save_pretrained(tmp_path / "x")
    bank.activate(None)
    model.save_pretrained(tmp_path / "x")


def adapted_llama(like):
    model = copy.deepcopy(like)
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    return model
