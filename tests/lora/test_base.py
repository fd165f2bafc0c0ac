"""An adapter belongs to the base that it was made on: law 7, over bases that look alike."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.errors import AdapterError
from tests.factories import assert_same, llama, move, output, snapshot

TOKENS = torch.arange(1, 7)[None]


@pytest.fixture
def made(tmp_path):
    """A llama's weights and an adapter's directory."""
    torch.manual_seed(1)
    model = llama().eval()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    inject(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    save_adapter(move(model), tmp_path)
    return weights, tmp_path, output(model, TOKENS)


def base(weights, **changes):
    model = llama(**changes).eval()
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def test_another_base_of_equal_shapes_is_refused_and_stays_as_it_was(made):
    weights, directory, _ = made
    model = base(weights)
    matrices = [name for name, p in model.named_parameters() if p.dim() == 2]  # all but norms, which start at one
    with torch.no_grad():  # as another seed would
        for name in reversed(matrices):
            model.get_parameter(name).add_(1e-3)
    before = snapshot(model)
    first = (
        f"{len(matrices)} of {len(weights)} tensors differ, first {', '.join(matrices[:4])} and {len(matrices) - 4} "
    )
    with pytest.raises(AdapterError, match=first):
        load_adapter(model, directory)
    assert_same(model, before)
    with pytest.raises(AdapterError, match=r"9 of \d+ tensors differ, first model\.layers\.2\.self_attn\.q_proj"):
        load_adapter(base(weights, num_hidden_layers=3), directory)


@pytest.mark.parametrize("write", ["data", "numpy"])
def test_a_second_save_notes_the_base_that_it_was_made_on_however_that_was_written(made, write):
    weights, directory, _ = made
    model, other = base(weights), {**weights, "lm_head.weight": weights["lm_head.weight"] + 1}
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    save_adapter(move(model), directory)
    if write == "data":
        model.lm_head.weight.data.copy_(other["lm_head.weight"])
    else:
        model.lm_head.weight.detach().numpy()[:] = other["lm_head.weight"]
    save_adapter(model, directory)
    with pytest.raises(AdapterError, match=r"another base.* 1 of \d+ tensors differ, first lm_head\.weight"):
        load_adapter(base(weights), directory)
    load_adapter(base(other), directory)


def test_the_same_base_loads_without_a_word_and_another_aloud_where_it_was_asked_for(made):
    weights, directory, expected = made
    model, same = base(weights), base(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(same, directory)
    assert torch.equal(output(same, TOKENS), expected)
    with pytest.raises(LoRAError, match="adapted already"):
        load_adapter(same, directory)
    merge(same)
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(same, directory)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"allow_other_base: .*another base.*first lm_head\.weight.*not those that"):
        load_adapter(model, directory, allow_other_base=True)
    assert model.model.layers[0].self_attn.q_proj.lora_A.abs().sum() > 0


@pytest.mark.parametrize("twice", [False, True], ids=["", "in two places"])
def test_a_head_that_the_adapter_brings_is_no_other_base(twice, tmp_path):
    model, head = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)
    for name in ("first", "second")[: 1 + twice]:
        model.add_module(name, head)
    other, x = copy.deepcopy(model), torch.randn(3, 8)
    nn.init.normal_(other.first.weight)
    inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["first"]))
    load_adapter(other, save_adapter(move(model), tmp_path))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_a_base_that_was_noted_by_the_names_of_a_wrapped_model_is_the_plain_one(wrapper, tmp_path):
    """As `torch.compile` or `DataParallel` would name it, by a class that is not known as a wrapper."""

    def build(block):
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict({"0": nn.Linear(4, 4), "1": block(nn.Linear(4, 4))}))

    old, model = build(lambda layer: nn.ModuleDict({wrapper: nn.Sequential(layer)})), build(nn.Sequential)
    other, x = copy.deepcopy(model), torch.randn(2, 4)
    inject(old, LoRAConfig(r=2, target_modules="0"))
    load_adapter(model, save_adapter(move(old), tmp_path))
    assert torch.equal(model[0](x), old[0](x))
    with torch.no_grad():
        other[1][0].weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"1 of 4 tensors differ, first 1\.0\.weight"):
        load_adapter(other, tmp_path)
