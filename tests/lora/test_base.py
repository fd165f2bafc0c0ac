"""An adapter belongs to the base that it was made on: law 7, over bases that look alike."""

import json
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, save_adapter
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.provenance import CHECKSUM, PROVENANCE
from tests.factories import assert_same, distance, llama, move, output, sequential, snapshot

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
    with torch.no_grad():  # as another seed would: all but norms, which start at one
        for name in reversed([n for n, p in model.named_parameters() if p.dim() == 2]):
            model.get_parameter(name).add_(1e-3)
    before = snapshot(model)
    count, matrices = len(weights), [name for name, tensor in weights.items() if tensor.dim() == 2]
    listed = f"{len(matrices)} of {count} tensors differ, first {', '.join(matrices[:4])} and {len(matrices) - 4} more"
    assert matrices != sorted(matrices), "the model's own order is not the alphabet's"
    with pytest.raises(AdapterError, match=listed):
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
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"allow_other_base: .*another base.*first lm_head\.weight.*not those that"):
        load_adapter(model, directory, allow_other_base=True)
    assert model.model.layers[0].self_attn.q_proj.lora_A.abs().sum() > 0


def test_a_head_that_the_adapter_brings_is_no_other_base(tmp_path):
    for name in ("4", "first"):
        make = sequential if name == "4" else tied_twice
        model = make()
        weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=[name]))
        save_adapter(move(model), tmp_path / name)
        other = make()
        nn.init.normal_(next(p for n, p in other.named_parameters() if n.startswith(name)))
        other.load_state_dict({k: v for k, v in weights.items() if not k.startswith((name, "second"))}, strict=False)
        load_adapter(other, tmp_path / name)
        x = torch.randn(3, 8)
        assert torch.equal(other(x), model(x))


def tied_twice():
    """A head in two places."""
    model = nn.Sequential()
    model.add_module("0", nn.Linear(8, 8))
    model.add_module("first", nn.Linear(8, 8))
    model.add_module("second", model.first)
    return model


def test_a_fingerprint_of_the_first_format_is_answered_as_such(made):
    weights, directory, expected = made
    file = directory / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    record = json.loads(metadata[PROVENANCE])
    del record["base"]["format"]
    record["adapter"] = record["base"]["digest"] = "0" * 64
    del metadata[CHECKSUM]
    save_file(load_file(file), file, {**metadata, PROVENANCE: json.dumps(record)})
    model = base(weights)
    for options in ({}, {"allow_other_base": True}):
        with pytest.raises(AdapterError, match=r"of format 1 and this version reads format 2; PEFT opens the adapter"):
            load_adapter(model, directory, **options)
    theirs = peft.PeftModel.from_pretrained(base(weights), directory).eval()
    assert distance(output(theirs, TOKENS), expected) < 1e-6


class Wrapped(nn.Module):
    """A block of which `torch.compile` or `DataParallel` would make this."""

    def __init__(self, block, name):
        super().__init__()
        self.add_module(name, block)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_a_base_that_was_noted_by_the_names_of_a_wrapped_model_is_the_plain_one(wrapper, tmp_path):
    def build(wrap=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
        if wrap:  # of a class that is not known as a wrapper, so that the names stay inside
            model[1] = Wrapped(model[1], wrap)
        return model

    old, x = build(wrapper), torch.randn(2, 4)
    inject(old, LoRAConfig(r=2, target_modules="0"))
    save_adapter(move(old), tmp_path)
    model = build()
    load_adapter(model, tmp_path)
    assert torch.equal(model[0](x), old[0](x))
    other = build()
    with torch.no_grad():
        other[1][0].weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"1 of 6 tensors differ, first 1\.0\.weight"):
        load_adapter(other, tmp_path)
