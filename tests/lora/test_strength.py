"""The strength of an update: what `save_adapter` makes of it, and what is refused.

That 0 is the base and 1 the adapter for every kind of layer, option and dtype is in `laws.check_strength`, and that
PEFT computes the same at any strength in `laws.check_peft_opens_ours`.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.bank.strength import scaled
from lora_lightning.lora.frozen.tensors import adapter_tensors
from tests.lora.kinds import inputs, net, shake
from tests.lora.laws import relative

PATTERNS = {"rank_pattern": {"up": 5}, "alpha_pattern": {"down": 9}, "use_rslora": True}


def adapted(**fields):
    model = net(torch.float64)
    inject(model, LoRAConfig(r=3, alpha=7, target_modules=["up", "down", "square"], **fields))
    return shake(model)


def test_the_strength_is_in_the_alpha_of_each_layer_and_nowhere_else(tmp_path):
    model, again = adapted(**PATTERNS), net(torch.float64)
    whole = save_adapter(model, tmp_path / "whole")
    with scaled(model, 0.3):
        part, want = save_adapter(model, tmp_path / "part"), model(inputs(torch.float64))
        load_adapter(again, save_adapter(model, tmp_path / "vllm", serving="vllm"))
    assert relative(again(inputs(torch.float64)), want) <= 1e-12
    first, second = (json.loads((one / "adapter_config.json").read_text()) for one in (whole, part))
    assert second.pop("lora_alpha") == pytest.approx(0.3 * first.pop("lora_alpha"))
    alphas = first.pop("alpha_pattern")
    assert second.pop("alpha_pattern") == {key: pytest.approx(0.3 * alpha) for key, alpha in alphas.items()}
    assert second == first
    files = [load_file(one / "adapter_model.safetensors") for one in (whole, part)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0].keys() | files[1].keys())


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
    for wrong in (-0.5, float("nan"), float("inf"), True, "half"):
        with pytest.raises(LoRAError, match="finite number of at least 0"):
            merge(model, scale=wrong)
    with torch.no_grad():
        model.up.lora_B[0, 0] = float("nan")
    with pytest.raises(LoRAError):
        merge(model, scale=0.5)
    assert settings == [m.lora_settings for m in model.modules() if hasattr(m, "lora_settings")]


def test_a_dora_channel_without_w0_has_no_form_and_is_refused():
    model = adapted(use_dora=True)
    with torch.no_grad():
        model.up.lora_magnitude_vector[0] = model.up.updated_norms()[0] / 2  # its factor is 1/2: 1 + 2 (1/2 - 1) = 0
    with pytest.raises(LoRAError, match="without W0"), scaled(model, 2.0):
        pass
