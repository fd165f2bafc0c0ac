"""Activation checkpointing and offloading by a flag: the same gradients to the bit, and no trace outside a step.

Where activations wait in the CPU's memory, the CPU stands in for the GPU here: what would be moved is copied.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from benchmarks.measure import kept_bytes
from lora_lightning import LoRAConfig, LoRAError, inject, merge
from lora_lightning.lora.layers.fused_linear import eager_arithmetic
from lora_lightning.lora.targets.blocks import repeated_blocks
from lora_lightning.training.activations import Offload, Recomputation, Waiting, without_cache
from lora_lightning.training.strategies.fsdp2 import shard
from tests.distributed import one_process
from tests.factories import snapshot
from tests.training.activations import IDS, MODELS, adapted, assert_same_step, step
from tests.training.small import trainer_of


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_to_the_bit_in_either_mode(name, mode):
    model, inputs = adapted(name)
    model.train(mode == "train")
    recomputation = Recomputation(model)
    assert len(recomputation.blocks) == MODELS[name][2]
    assert_same_step(step(model, inputs, without_cache(model)), step(model, inputs, recomputation.on()))


def test_what_is_kept_falls_to_the_blocks_inputs():
    """BERT of two layers, 3 x 8 tokens: two inputs of 32 numbers each, and what embeddings and head keep."""
    model, inputs = adapted("bert")

    def loss():
        return model(**inputs).logits.sum()

    with Recomputation(model).on():
        recomputed = kept_bytes(model, loss)
    assert recomputed < 0.3 * kept_bytes(model, loss)


@pytest.mark.parametrize("arithmetic", ["fused", "eager"])
def test_dropout_draws_the_same_mask_again(arithmetic):
    model, inputs = adapted("bert", dropout=0.3, target_modules=["query", "key", "value", "intermediate.dense"])
    model.train()
    with eager_arithmetic() if arithmetic == "eager" else contextlib.nullcontext():
        assert_same_step(step(model, inputs), step(model, inputs, Recomputation(model).on()))


def test_under_autocast_it_recomputes_under_autocast():
    model, inputs = adapted("llama")
    mixed = torch.autocast("cpu", torch.bfloat16)
    plain = step(model, inputs, mixed, without_cache(model))
    assert plain[0].dtype == torch.bfloat16
    assert_same_step(plain, step(model, inputs, mixed, Recomputation(model).on()))


def test_sharded_blocks_are_computed_again_with_their_weights_there():
    """FSDP2 lets a block's weights go after its forward, and gathers them before backward computes it again."""
    results = []
    for context in (without_cache, lambda model: Recomputation(model).on()):
        with one_process() as mesh:
            model, inputs = adapted("llama")
            shard(model, mesh, torch.device("cpu"))
            out, grads, state = step(model, inputs, context(model))
            results.append((out, {name: grad.full_tensor() for name, grad in grads.items()}, state))
    assert_same_step(*results)


def test_no_trace_is_left_and_none_shows_without_gradients():
    model, inputs = adapted("llama")
    before, keys = snapshot(model), list(model.state_dict())
    recomputation = Recomputation(model)
    with recomputation.on():
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == [c for _, c in before["classes"]]
        twin = copy.deepcopy(model)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    assert snapshot(model)["attributes"] == before["attributes"]
    assert model.config.use_cache
    assert model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False).shape == (3, 7)
    merge(model)
    assert list(Recomputation(model).blocks) == list(recomputation.blocks)


def test_what_cannot_be_computed_again_is_one_clear_error(make_module):
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(LoRAError, match="found no blocks in Sequential"):
        make_module(plain, LoRAConfig(r=2, exclude_modules=[]), activation_checkpointing=True)
    layer = lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))  # noqa: E731
    model = nn.Sequential(layer(), layer())
    inject(model, LoRAConfig(r=2, target_modules=["0.0"], modules_to_save=["1.1"]))
    recomputation = Recomputation(model.train())
    with pytest.raises(LoRAError, match="statistics of '1"), recomputation.on():
        pass
    assert not any("forward" in vars(m) for m in model.modules())


def test_stages_are_looked_into_and_experts_are_not():
    def two(make):
        return nn.ModuleList([make(), make()])

    def layer(width=8):
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    stages = nn.Sequential(*(nn.ModuleDict({"blocks": two(lambda w=width: layer(w))}) for width in (4, 8)))
    assert list(repeated_blocks(stages)) == ["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1"]
    mixture = two(lambda: nn.ModuleDict({"gate": nn.Linear(8, 2), "experts": two(layer)}))
    assert list(repeated_blocks(nn.ModuleDict({"layers": mixture}))) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("flag", ["activation_checkpointing", "offload_activations"])
def test_a_fit_with_the_flag_is_the_fit_without_it(tmp_path, make_module, make_data, flag):
    states = []
    for on in (False, True):
        module, calls = make_module(**{flag: on}), []
        module.backbone.bert.encoder.layer[1].attention.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        options = {"max_steps": 3, "limit_val_batches": 1, "enable_checkpointing": False}
        trainer_of(tmp_path, **options).fit(module, make_data())
        again = 3 if on and flag == "activation_checkpointing" else 0
        assert len(calls) == 3 + again + 1  # three steps and a batch to validate
        states.append(module.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def offload(model, small=0):
    return Offload(model, small, stays_on=())


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "timm resnet", "own"])
def test_offloaded_gradients_are_the_same_to_the_bit(name):
    model, inputs = adapted(name)
    moving, plain = offload(model), step(model, inputs)
    assert_same_step(plain, step(model, inputs, moving.on()))
    assert (once := moving.moved) > 1000
    if name != "llama":  # without a cache, rounding is another
        assert_same_step(plain, step(model, inputs, moving.on(), Recomputation(model).on()))
        assert moving.moved < once


def test_neither_w0_nor_what_is_small_is_moved(monkeypatch):
    model, inputs = adapted("bert")
    moved, own = [], Waiting.__init__
    monkeypatch.setattr(Waiting, "__init__", lambda self, tensor: (moved.append(tensor), own(self, tensor))[1])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    step(model, inputs, offload(model, small=1000).on())
    assert moved
    assert all(tensor.nbytes >= 1000 for tensor in moved)
    assert not any(tensor.untyped_storage().data_ptr() in weights for tensor in moved)


def test_on_a_cpu_nothing_is_hooked_and_that_is_said():
    model, inputs = adapted("bert")
    moving = Offload(model)
    with moving.on():
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        model(**inputs)
    assert moving.moved == 0
    assert moving._has_warned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_activations_leave_it():
    model, inputs = adapted("bert")
    model, inputs = model.cuda(), {name: tensor.cuda() for name, tensor in inputs.items()}
    moving = Offload(model, small=0)
    assert_same_step(step(model, inputs), step(model, inputs, moving.on()))
    assert moving.moved > 1000
