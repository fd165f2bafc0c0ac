from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, merge, remove
from tests.factories import FAMILIES, assert_same, distance, folded, move, snapshot

FAMILY = FAMILIES["encoder"]
FEED = LoRAConfig(r=2, target_modules=["linear1", "linear2"])


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the fused encoder kernel."""
    calls, kernel = [], torch._transformer_encoder_layer_fwd

    def counted(*args, **kwargs):
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    return calls


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fields", [FEED, LoRAConfig(r=2, target_modules=["layers.1.linear2"])], ids=["all", "one"])
def test_an_encoder_in_eval_gives_the_adapted_output(fused, fields, grad):
    plain, model = FAMILY.build(torch.float64), FAMILY.build(torch.float64)
    report = inject(model, fields)
    move(model)
    x = FAMILY.inputs(torch.float64)
    with torch.set_grad_enabled(grad):
        got = model(x)
        assert not any(layer.linear2.training for layer in model.layers)
        assert len(fused) == 2 - len({row.module[:8] for row in report.modules})  # layers without adapters keep it
        reference = folded(plain, model, {row.module: 2.0 for row in report.modules})
        assert distance(got, reference(x)) < 1e-12
        assert distance(got, plain(x)) > 1e-3


def test_the_plain_encoder_takes_the_fused_kernel_so_that_there_is_something_to_hold_off(fused):
    with torch.no_grad():
        FAMILY.run(FAMILY.build())
    assert len(fused) == 2


@pytest.mark.parametrize("grad", [False, True])
def test_a_padded_batch_in_eval_gives_the_adapted_output(grad):
    model = FAMILY.build()
    inject(model, FEED)
    move(model)
    x = FAMILY.inputs()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(grad):  # with gradients, attention refuses the encoder's nested tensors
        whole = model(x, src_key_padding_mask=padding)
        short = model(x[1:, :3])
    assert whole.shape == x.shape
    assert whole.requires_grad is grad
    assert distance(whole[1:, :3], short) < 1e-5


def test_a_saved_norm_inside_an_encoder_layer_is_used_in_eval():
    model = nn.ModuleDict({"encoder": FAMILY.build(), "body": nn.Linear(16, 16)}).eval()
    inject(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["encoder.layers.0.norm1"]))
    x = FAMILY.inputs()
    with torch.no_grad():
        before = model["encoder"](x)
        model["encoder"].layers[0].norm1.lora_copy.bias.add_(torch.arange(16.0))
        assert not torch.allclose(model["encoder"](x), before)


@pytest.mark.parametrize("back", [merge, remove])
@pytest.mark.parametrize("copier", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_kernel_is_allowed_again_in_the_plain_model(fused, back, copier):
    original = FAMILY.build().requires_grad_(False)
    before = snapshot(original)
    inject(original, FEED)
    model = copier(original) if copier else original
    back(model)
    assert_same(model, before, but=("state",) if back is merge else ())
    with torch.no_grad():
        FAMILY.run(model)
        assert len(fused) == 2
        if copier:  # and still held off where the adapters are
            FAMILY.run(original)
            assert len(fused) == 2
