"""The strength of an update: what `save_adapter` and PEFT make of it, and what is refused.

That 0 is the base and 1 the adapter, for every kind of layer, option and dtype, is in `laws.check_strength`.
"""

import json

import peft
import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.bank.strength import scaled
from lora_lightning.lora.frozen.tensors import adapter_tensors
from tests.lora.kinds import inputs, net, shake
from tests.lora.laws import relative

LINEARS = ["up", "down", "square"]
PATTERNS = {"rank_pattern": {"up": 5}, "alpha_pattern": {"down": 9}}
CONFIGS = {
    "plain": {},
    "patterns": PATTERNS,
    "rslora": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True},
    "dora pissa": {"use_dora": True, "init": "pissa"},
    "pissa rslora": {"init": "pissa", "use_rslora": True},
    "olora": {"init": "olora"},
    "lora_bias": {"lora_bias": True, "target_modules": ["up", "square"]},
    "biases and a head": {"bias": "all", "modules_to_save": ["head"]},
}


def adapted(**fields):
    model = net(torch.float64)
    inject(model, LoRAConfig(**{"r": 3, "alpha": 7, "target_modules": LINEARS, **fields}))
    return shake(model)


@pytest.mark.parametrize("scale", [0.3, 1.25])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_opens_an_adapter_of_a_strength_and_computes_the_same(name, scale, tmp_path):
    model = adapted(**CONFIGS[name])
    with scaled(model, scale):
        save_adapter(model, tmp_path)
        want = model(inputs(torch.float64))
    wrapped = peft.PeftModel.from_pretrained(net(torch.float64), tmp_path).double().eval()
    assert relative(wrapped(inputs(torch.float64)), want) <= 1e-12


@pytest.mark.parametrize("name", ["plain", "patterns", "rslora"])
def test_the_strength_is_in_the_alpha_of_each_layer_and_nowhere_else(name, tmp_path):
    model = adapted(**CONFIGS[name])
    whole = json.loads((save_adapter(model, tmp_path / "whole") / "adapter_config.json").read_text())
    with scaled(model, 0.3):
        part = json.loads((save_adapter(model, tmp_path / "part") / "adapter_config.json").read_text())
    assert part.pop("lora_alpha") == pytest.approx(0.3 * whole.pop("lora_alpha"))
    alphas = whole.pop("alpha_pattern"), part.pop("alpha_pattern")
    assert alphas[1] == {key: pytest.approx(0.3 * alpha) for key, alpha in alphas[0].items()}
    assert part == whole
    files = [(tmp_path / one / "adapter_model.safetensors") for one in ("whole", "part")]
    first, second = (peft.utils.save_and_load.safe_load_file(file) for file in files)
    assert all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())


def test_what_trains_in_full_is_written_as_far_as_the_strength_goes(tmp_path):
    model, plain = adapted(bias="all", modules_to_save=["head"]), net(torch.float64)
    trained = adapter_tensors(model)["head.lora_copy.weight"].clone()
    with scaled(model, 0.5):
        save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    half = adapter_tensors(plain)["head.lora_copy.weight"]
    torch.testing.assert_close(half, (net(torch.float64).head.weight + trained) / 2, rtol=1e-14, atol=1e-14)


def test_vllms_form_has_the_strength_too(tmp_path):
    model = adapted(**CONFIGS["rslora"])
    with scaled(model, 0.5):
        save_adapter(model, tmp_path, serving="vllm")
        want = model(inputs(torch.float64))
    again = net(torch.float64)
    load_adapter(again, tmp_path)
    assert relative(again(inputs(torch.float64)), want) <= 1e-12


def test_a_head_and_its_tied_copy_are_scaled_once():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    model["second"].weight = model["first"].weight
    inject(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["first", "second"]))
    first, second = shake(model)["first"], model["second"]
    own, trained = first.weight.clone(), first.lora_copy.weight.clone()
    with scaled(model, 0.5):
        assert first.lora_copy.weight is second.lora_copy.weight
        torch.testing.assert_close(first.lora_copy.weight, (own + trained) / 2)


def test_a_fit_goes_on_where_it_was_after_an_error_within_and_after_a_merge_that_is_refused():
    model = adapted(use_dora=True, modules_to_save=["head"])
    before = {key: tensor.clone() for key, tensor in adapter_tensors(model).items()}
    settings = [m.lora_settings for m in model.modules() if hasattr(m, "lora_settings")]
    with pytest.raises(RuntimeError, match="within"), scaled(model, 0.5):
        raise RuntimeError("within")
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_tensors(model).items())
    with torch.no_grad():
        model.up.lora_B[0, 0] = float("nan")
    with pytest.raises(LoRAError, match="not finite"):
        merge(model, scale=0.5)
    assert settings == [m.lora_settings for m in model.modules() if hasattr(m, "lora_settings")]


def test_what_is_no_strength_is_refused_in_one_line():
    model = adapted()
    for wrong in (-0.5, float("nan"), float("inf"), True, "half"):
        with pytest.raises(LoRAError, match="finite number of at least 0"):
            merge(model, scale=wrong)
    assert model.up.lora_settings.scale


def test_a_dora_channel_without_w0_has_no_form_and_is_refused():
    model = adapted(use_dora=True)
    with torch.no_grad():
        model.up.lora_magnitude_vector[0] = model.up.updated_norms()[0] / 2  # its factor is 1/2: 1 + 2 (1/2 - 1) = 0
    with pytest.raises(LoRAError, match="without W0"), scaled(model, 2.0):
        pass
