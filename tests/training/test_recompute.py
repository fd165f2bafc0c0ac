"""Activation checkpointing by one flag: the same gradients to the bit, most bytes gone, and no trace outside a step."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers as tf
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.measure import kept_bytes
from lora_lightning import LoRAConfig, LoRAError, inject, merge
from lora_lightning.lora.layers.fused_linear import eager_arithmetic
from lora_lightning.lora.targets.blocks import repeated_blocks
from lora_lightning.training.activations.checkpointing import Recomputation, without_cache
from tests.distributed import one_process
from tests.factories import encoder, move, snapshot

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 40}
DECODER = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 32}
IDS = torch.randint(1, 40, (3, 8), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def timm_model(name, **kwargs):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=3, **kwargs)


class Own(nn.Module):
    """Blocks that pass tuples, keywords and a number on, one of them used twice."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.2)

        def forward(self, pair, *, mask=None, times=1):
            x, memory = pair
            x = x + self.down(self.drop(torch.tanh(self.up(x * mask)))) * times
            return x, memory + x

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"a": Own.Block(), "b": Own.Block()})
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        pair = (x, torch.zeros_like(x))
        for name in ("a", "b", "a"):
            pair = self.blocks[name](pair, mask=(x > -1).float(), times=2)
        return self.head(pair[0] + pair[1])


class Mixture(nn.Module):
    """Layers whose experts are a list of modules: the layers are the blocks."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 2)
            expert = lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))  # noqa: E731
            self.experts = nn.ModuleList([expert(), expert()])

        def forward(self, x):
            weights = self.gate(x).softmax(-1)
            return x + sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Mixture.Layer(), Mixture.Layer()])
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


MODELS = {
    "bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)), {"input_ids": IDS}),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)), {"input_ids": IDS}),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40)),
        {"input_ids": IDS},
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=40)
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
    ),
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2), {"x": PIXELS}),
    "timm resnet": (lambda: timm_model("resnet18"), {"x": PIXELS}),
    "encoder": (encoder, {"src": torch.randn(2, 5, 16)}),
    "own": (Own, {"x": torch.randn(4, 8)}),
    "mixture": (Mixture, {"x": torch.randn(4, 6, 8)}),
}
BLOCKS = {"bert": 2, "llama": 2, "gpt2": 2, "t5": 4, "timm vit": 12, "timm resnet": 8, "encoder": 2, "own": 2}
BLOCKS |= {"mixture": 2}


def adapted(name, **lora):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make().eval()
    targets = {"target_modules": r".*conv\d"} if "resnet" in name else {"target_modules": "all-linear"}
    inject(model, LoRAConfig(r=2, exclude_modules=[], **targets, **lora))
    return move(model, 0.1), inputs


def step(model, inputs, context=None):
    """Output and gradients of one step from the same random numbers, and torch's state after it."""
    model.zero_grad()
    torch.manual_seed(3)
    with context or contextlib.nullcontext():
        out = model(**inputs)
        out = out if isinstance(out, torch.Tensor) else out.logits
        loss = out.float().sin().sum()  # not of squares, whose sum a layer norm holds still
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return out.detach(), grads, torch.get_rng_state()


def assert_same_step(one, other):
    assert torch.equal(one[0], other[0])
    assert len(one[1]) > 2
    assert all(torch.equal(other[1][name], grad) for name, grad in one[1].items())
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_are_the_same_to_the_bit_in_either_mode(name, mode):
    model, inputs = adapted(name)
    model.train(mode == "train")
    recomputation = Recomputation(model)
    assert len(recomputation.blocks) == BLOCKS[name]
    assert_same_step(step(model, inputs, without_cache(model)), step(model, inputs, recomputation.on()))


def test_what_is_kept_falls_to_the_blocks_inputs():
    """BERT of two layers, 3 x 8 tokens: two inputs of 32 numbers each, and what embeddings and head keep."""
    model, inputs = adapted("bert")
    recomputation = Recomputation(model)

    def plainly():
        return model(**inputs).logits.sum()

    def recomputed():
        with recomputation.on():
            return plainly()

    assert kept_bytes(model, recomputed) < 0.3 * kept_bytes(model, plainly)


@pytest.mark.parametrize("arithmetic", ["fused", "eager"])
def test_dropout_draws_the_same_mask_again(arithmetic):
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).eval()
    inject(model, LoRAConfig(r=2, dropout=0.3, target_modules=["query", "intermediate.dense"]))
    move(model, 0.1).train()
    context = eager_arithmetic if arithmetic == "eager" else contextlib.nullcontext
    inputs = {"input_ids": IDS}
    with context():
        assert_same_step(step(model, inputs), step(model, inputs, Recomputation(model).on()))


def test_dropout_that_siblings_share_is_that_of_the_recomputation():
    """Gradients against finite differences in float64: a mask that changed between the two would show."""
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).double().eval()
    inject(model, LoRAConfig(r=2, dropout=0.3, target_modules=["query", "key", "value"]))
    move(model, 0.1).train()
    recomputation = Recomputation(model)
    _, grads, _ = step(model, {"input_ids": IDS}, recomputation.on())
    for name in ("query", "value"):
        name = f"bert.encoder.layer.0.attention.self.{name}.lora_B"  # noqa: PLW2901
        parameter, change, losses = model.get_parameter(name), 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[0, 0] += sign * change
            out = step(model, {"input_ids": IDS}, recomputation.on())[0]
            losses.append(out.sin().sum())
            with torch.no_grad():
                parameter[0, 0] -= sign * change
        slope = (losses[0] - losses[1]) / (2 * change)
        torch.testing.assert_close(grads[name][0, 0], slope.to(grads[name]), rtol=1e-5, atol=1e-8)


def test_under_autocast_it_recomputes_under_autocast():
    model, inputs = adapted("llama")

    def mixed(*contexts):
        stack = contextlib.ExitStack()
        for context in (torch.autocast("cpu", torch.bfloat16), *contexts):
            stack.enter_context(context)
        return stack

    plain = step(model, inputs, mixed(without_cache(model)))
    assert plain[0].dtype == torch.bfloat16
    assert_same_step(plain, step(model, inputs, mixed(Recomputation(model).on())))


def test_sharded_blocks_are_computed_again_with_their_weights_there():
    """FSDP2 lets a block's weights go after its forward, and gathers them before backward computes it again."""
    results = []
    for context in (without_cache, lambda model: Recomputation(model).on()):
        with one_process() as mesh:
            model, inputs = adapted("llama")
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            out, grads, state = step(model, inputs, context(model))
            results.append((out, {name: grad.full_tensor() for name, grad in grads.items()}, state))
    assert_same_step(*results)


def test_no_trace_is_left_and_none_shows_without_gradients(tmp_path):
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
    generated = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (3, 7)
    merge(model)
    step_of = Recomputation(model)
    assert [b for b in step_of.blocks] == [b for b in recomputation.blocks]  # noqa: C416


def test_a_model_without_blocks_is_one_clear_error(make_module):
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(LoRAError, match="found no blocks in Sequential"):
        make_module(plain, LoRAConfig(r=2, exclude_modules=[]), activation_checkpointing=True)


def test_batch_statistics_that_train_are_refused():
    layer = lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))  # noqa: E731
    model = nn.Sequential(layer(), layer())
    inject(model, LoRAConfig(r=2, target_modules=["0.0"], modules_to_save=["1.1"]))
    recomputation = Recomputation(model.train())
    with pytest.raises(LoRAError, match="statistics of '1"), recomputation.on():
        pass
    assert not any("forward" in vars(m) for m in model.modules())


def test_stages_are_looked_into_and_experts_are_not():
    class Stage(nn.Module):
        def __init__(self, width):
            super().__init__()
            block = lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU())  # noqa: E731
            self.blocks = nn.ModuleList([block(), block()])
            self.down = nn.Linear(width, 2 * width)

    stages = nn.Sequential(Stage(4), Stage(8))
    assert list(repeated_blocks(stages)) == ["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1"]
    assert list(repeated_blocks(Mixture())) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("flag", ["activation_checkpointing", "offload_activations"])
def test_a_fit_with_the_flag_is_the_fit_without_it(tmp_path, make_module, make_data, flag):
    states = []
    for on in (False, True):
        module, calls = make_module(**{flag: on}), []
        module.backbone.bert.encoder.layer[1].attention.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        options = {"max_steps": 3, "limit_val_batches": 1, "logger": False, "enable_checkpointing": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        trainer = Trainer(accelerator="cpu", **options, **quiet)
        trainer.fit(module, make_data())
        again = 3 if on and flag == "activation_checkpointing" else 0
        assert len(calls) == 3 + again + 1  # three steps and a batch to validate
        states.append(module.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
