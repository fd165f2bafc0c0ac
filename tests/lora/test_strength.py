"""The strength of an update: `scaled`, `merge(scale=)` and what `save_adapter` and PEFT make of it.

That 0 is the base and 1 the adapter, for every kind of layer and dtype, is in `laws.check_strength`.
"""

import json

import peft
import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.bank.strength import scaled
from lora_lightning.lora.frozen.tensors import adapter_tensors
from tests.lora.options_support import Net, inputs, net, shake

LINEARS = ["up", "down", "square"]
CONFIGS = {
    "plain": {"r": 3, "alpha": 10},
    "patterns": {"r": 3, "alpha": 7, "rank_pattern": {"up": 5}, "alpha_pattern": {"down": 9}},
    "rslora": {"r": 3, "alpha": 7, "use_rslora": True, "rank_pattern": {"up": 5}, "alpha_pattern": {"down": 9}},
    "dora": {"r": 3, "alpha": 7, "use_dora": True},
    "dora pissa": {"r": 3, "alpha": 7, "use_dora": True, "init": "pissa"},
    "pissa rslora": {"r": 3, "alpha": 7, "init": "pissa", "use_rslora": True},
    "olora": {"r": 3, "alpha": 7, "init": "olora"},
    "lora_bias": {"r": 3, "alpha": 7, "lora_bias": True, "target_modules": ["up", "square"]},
    "biases and a head": {"r": 3, "alpha": 7, "bias": "all", "modules_to_save": ["head"]},
}


def adapted(dtype=torch.float64, **fields):
    model = net(dtype)
    inject(model, LoRAConfig(**{"target_modules": LINEARS, **fields}))
    return shake(model)


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.25])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_opens_an_adapter_of_a_strength_and_computes_the_same(name, scale, tmp_path):
    model = adapted(**CONFIGS[name])
    with scaled(model, scale):
        save_adapter(model, tmp_path)
        want = model(inputs(torch.float64))
    wrapped = peft.PeftModel.from_pretrained(net(torch.float64), tmp_path).double().eval()
    # PEFT reads a file's numbers in the dtype that they have
    assert (wrapped(inputs(torch.float64)) - want).abs().max() <= 1e-12 * want.abs().max()


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
    model, plain = adapted(r=3, bias="all", modules_to_save=["head"]), net(torch.float64)
    trained = {key: tensor.clone() for key, tensor in adapter_tensors(model).items()}
    with scaled(model, 0.5):
        save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    half = adapter_tensors(plain)["head.lora_copy.weight"]
    want = (net(torch.float64).head.weight + trained["head.lora_copy.weight"]) / 2
    torch.testing.assert_close(half, want, rtol=1e-14, atol=1e-14)


def test_vllms_form_has_the_strength_too(tmp_path):
    model = adapted(**CONFIGS["rslora"])
    with scaled(model, 0.5):
        save_adapter(model, tmp_path, serving="vllm")
        want = model(inputs(torch.float64))
    again = net(torch.float64)
    load_adapter(again, tmp_path)
    assert (again(inputs(torch.float64)) - want).abs().max() <= 1e-12 * want.abs().max()


def test_a_head_and_its_tied_copy_are_scaled_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.body = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.body(self.first(x)))

    model = Tied()
    inject(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["first", "second"]))
    shake(model)
    own, trained = model.first.weight.clone(), model.first.lora_copy.weight.clone()
    with scaled(model, 0.5):
        assert model.first.lora_copy.weight is model.second.lora_copy.weight
        torch.testing.assert_close(model.first.lora_copy.weight, (own + trained) / 2)


def test_a_fit_goes_on_where_it_was_after_an_error_within(tmp_path):
    model = adapted(use_dora=True, r=3, modules_to_save=["head"])
    before = {key: tensor.clone() for key, tensor in adapter_tensors(model).items()}
    settings = [m.lora_settings for m in model.modules() if hasattr(m, "lora_settings")]
    with pytest.raises(RuntimeError, match="within"), scaled(model, 0.5):
        raise RuntimeError("within")
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_tensors(model).items())
    assert settings == [m.lora_settings for m in model.modules() if hasattr(m, "lora_settings")]


def test_a_merge_that_is_refused_leaves_the_strength_as_it_was():
    model = adapted(r=3)
    with torch.no_grad():
        model.up.lora_B[0, 0] = float("nan")
    settings = model.up.lora_settings
    with pytest.raises(LoRAError, match="not finite"):
        merge(model, scale=0.5)
    assert model.up.lora_settings == settings


def test_what_is_no_strength_is_refused_in_one_line():
    model = adapted(r=3)
    for wrong in (-0.5, float("nan"), float("inf"), True, "half"):
        with pytest.raises(LoRAError, match="finite number of at least 0"):
            merge(model, scale=wrong)
    assert isinstance(model, Net)
    assert model.up.lora_settings.scale


def test_a_dora_channel_without_w0_has_no_form_and_is_refused():
    model = adapted(use_dora=True, r=3)
    with torch.no_grad():
        model.up.lora_magnitude_vector[0] = model.up.updated_norms()[0] / 2  # its factor is 1/2: 1 + 2 (1/2 - 1) = 0
    with pytest.raises(LoRAError, match="without W0"), scaled(model, 2.0):
        pass
