"""Compiled in place by one flag: one graph, the same numbers to rounding, and no trace outside training steps."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import LoRAConfig, LoRAError, inject
from lora_lightning.training.activations import Compilation, Recomputation, parts_to_compile
from tests.factories import distance, hf, move
from tests.training.activations import DECODER, IDS, MODELS, PIXELS, TEXT, adapted, step
from tests.training.small import trainer_of

FULL = {"backend": "eager", "fullgraph": True}


class Small(nn.Module):
    """An embedding, three layers that read one tensor, a convolution, a transposed layer, a bare parameter, a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.turned = Conv1D(8, 8)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = torch.tanh(self.table(ids))
        x = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        x = self.turned(self.conv(x.mT).mT.contiguous())
        return self.head((x @ self.experts.sum(0)).mean(1))


KINDS = {
    "linear": {},
    "dropout": {"dropout": 0.1},
    "dora": {"use_dora": True},
    "all kinds": {"target_modules": ["table", "q", "v", "conv", "turned"], "target_parameters": ["experts"]},
    "bias, head": {"bias": "all", "modules_to_save": ["head"]},
    "olora": {"init": "olora", "lora_bias": True},
    "tokens": {"trainable_token_indices": [1, 3], "use_rslora": True},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_close_step(one, other):
    assert distance(other[0], one[0]) < 1e-5
    largest = max(float(grad.abs().max()) for grad in one[1].values())
    for name, grad in one[1].items():
        torch.testing.assert_close(other[1][name], grad, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_adapted_layer_is_traced_without_a_break(kind):
    torch.manual_seed(0)
    model = Small().eval()
    lora = {"target_modules": ["q", "k", "v"], **KINDS[kind]}
    inject(model, LoRAConfig(r=2, **lora))
    move(model, 0.1)
    inputs = {"ids": IDS}
    assert_close_step(step(model, inputs), step(model, inputs, Compilation(model, FULL).on()))


VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
OTHERS = {
    "distilbert": (
        functools.partial(hf, "DistilBertForSequenceClassification", dim=32, n_layers=2, n_heads=2, hidden_dim=48),
        TEXT,
    ),
    "mixtral": (functools.partial(hf, "MixtralForCausalLM", **DECODER, num_local_experts=2), TEXT),
    "vit": (functools.partial(hf, "ViTForImageClassification", **VIT), {"pixel_values": PIXELS}),
}
LATER = ["llama", "gpt2", "t5", "timm vit", "timm resnet", "encoder", *OTHERS]


@pytest.mark.slow
@pytest.mark.parametrize("name", LATER)
def test_the_standard_families_are_one_graph(name, monkeypatch):
    for other, made in OTHERS.items():
        monkeypatch.setitem(MODELS, other, made)
    model, inputs = adapted(name)
    compilation = Compilation(model, FULL | {"backend": "aot_eager"})
    assert_close_step(step(model, inputs), step(model, inputs, compilation.on()))


@pytest.mark.slow
def test_by_inductor_it_is_the_same_to_rounding():
    model, inputs = adapted("bert")
    compilation = Compilation(model, FULL | {"backend": "inductor"})
    assert_close_step(step(model, inputs), step(model, inputs, compilation.on()))


def test_a_language_model_keeps_its_head_out():
    llama, t5 = (MODELS[name][0]() for name in ("llama", "t5"))
    assert parts_to_compile(llama) == [llama.model]
    assert parts_to_compile(t5) == [t5.encoder, t5.decoder]
    bert = MODELS["bert"][0]()
    assert parts_to_compile(bert) == [bert]


def test_no_trace_is_left_outside_a_step():
    model, _ = adapted("bert")
    keys, compilation = list(model.state_dict()), Compilation(model, {"backend": "eager"})
    with compilation.on():
        assert list(model.state_dict()) == keys
        assert model._compiled_call_impl is not None
        assert copy.deepcopy(model)._compiled_call_impl is None
    assert model._compiled_call_impl is None
    classes = [(name, type(module)) for name, module in model.named_modules()]
    assert classes == [(name, type(module)) for name, module in adapted("bert")[0].named_modules()]


def test_it_goes_with_activation_checkpointing():
    model, inputs = adapted("bert")
    plain, recomputation, compilation = step(model, inputs), Recomputation(model), Compilation(model, FULL)
    assert_close_step(plain, step(model, inputs, recomputation.on(), compilation.on()))
    counter = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step(model, inputs, recomputation.on(), compilation.on())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counter


class Classifier(Small):
    """Called as a task calls a model of transformers."""

    def forward(self, input_ids, **rest):
        return super().forward(input_ids)[:, :2]


def test_a_fit_is_the_fit_without_it_to_rounding(tmp_path, make_data, make_module):
    losses, stats = [], torch._dynamo.utils.counters["stats"]
    for compile in (False, FULL):
        torch.manual_seed(0)
        module = make_module(Classifier(), LoRAConfig(r=2, modules_to_save=["head"]), compile=compile)
        before = dict(stats)
        trainer = trainer_of(tmp_path, limit_train_batches=4, limit_val_batches=2)
        trainer.fit(module, make_data())
        losses.append(float(trainer.callback_metrics["val/loss"]))
        assert (dict(stats) != before) == bool(compile)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        assert not any("_orig_mod" in key for key in torch.load(tmp_path / "a.ckpt")["state_dict"])
    assert abs(losses[0] - losses[1]) < 1e-5


def test_an_unknown_option_is_one_clear_error(make_module):
    with pytest.raises(LoRAError, match="got 'mod'; did you mean 'mode'"):
        make_module(compile={"mod": "default"})
