"""Activations that wait in the CPU's memory. Here the CPU stands in for the GPU: what would be moved is copied."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from lora_lightning import LoRAConfig, inject
from lora_lightning.training.activations.checkpointing import Recomputation
from lora_lightning.training.activations.offloading import Offload, Waiting
from tests.factories import move
from tests.training.test_recompute import IDS, SIZES, adapted, assert_same_step, step

NAMES = ["bert", "llama", "gpt2", "timm resnet", "own"]


def offload(model, small=0):
    return Offload(model, small, stays_on=())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_to_the_bit(name):
    model, inputs = adapted(name)
    moving = offload(model)
    plain = step(model, inputs)
    assert_same_step(plain, step(model, inputs, moving.on()))
    assert moving.moved > 1000
    both = Recomputation(model)

    def recomputed():
        from contextlib import ExitStack

        stack = ExitStack()
        stack.enter_context(moving.on())
        stack.enter_context(both.on())
        return stack

    once = moving.moved
    if name != "llama":  # without a cache, rounding is another
        assert_same_step(plain, step(model, inputs, recomputed()))
    assert moving.moved < once or name == "llama"


def test_neither_w0_nor_what_is_small_is_moved(monkeypatch):
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).eval()
    inject(model, LoRAConfig(r=2))
    move(model, 0.1)
    moved = []
    monkeypatch.setattr(Waiting, "__init__", noting(moved))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    step(model, {"input_ids": IDS}, offload(model, small=1000).on())
    assert moved
    assert all(tensor.nbytes >= 1000 for tensor in moved)
    assert not any(tensor.untyped_storage().data_ptr() in weights for tensor in moved)


def noting(moved):
    own = Waiting.__init__

    def init(self, tensor):
        moved.append(tensor)
        own(self, tensor)

    return init


def test_an_input_that_three_layers_save_is_moved_once():
    """Plain layers here: query, key and value each save x."""
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in "qkv"}).requires_grad_(True)
    x = torch.randn(32, 64, requires_grad=True)
    moving = offload(model, small=4096)
    with moving.on():
        hidden = x * 2
        out = sum(model[name](hidden).sum() for name in "qkv")
    assert moving.moved == hidden.nbytes
    out.backward()
    torch.testing.assert_close(model["q"].weight.grad, torch.ones(32, 64).T @ (2 * x.detach()))


def test_on_a_cpu_nothing_is_hooked_and_that_is_said(capsys):
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
    plain = step(model, inputs)
    assert_same_step(plain, step(model, inputs, moving.on()))
    assert moving.moved > 1000
