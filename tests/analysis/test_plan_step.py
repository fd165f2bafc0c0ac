"""A step on stand-ins keeps, needs and computes what the same step does with numbers."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from benchmarks.measure import kept_bytes
from lora_lightning import CausalLM, LoRAConfig, inject
from lora_lightning.commands.plan.block_scaling import SHORT, depth_of, scale, shorten
from lora_lightning.commands.plan.memory_tracker import fake_mode, put_stand_ins
from lora_lightning.commands.plan.step_cost import NUMBERS, step_cost
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.activations.compilation import TrainingForward

ROWS, LENGTH = 4, 48
AdamW = functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True)


SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


def bert(attention="eager"):
    config = tf.BertConfig(**SIZES, num_hidden_layers=3, vocab_size=100, max_position_embeddings=64)
    return tf.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)


def llama(layers=3):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=300, num_key_value_heads=2))


def gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def convolutions():
    """Two of them, a norm and a head."""
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second, *head)


IDS = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 99
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([LENGTH - 1]), 0)


def classified(model):
    return model(input_ids=IDS, attention_mask=MASK).logits.float().logsumexp(-1).mean()


def continued(model):
    labels = IDS.masked_fill(MASK == 0, -100)
    return CausalLM().step(model, {"input_ids": IDS, "attention_mask": MASK, "labels": labels}).loss


def seen(model):
    return model(torch.ones(ROWS, 3, 20, 20)).float().logsumexp(-1).mean()


LINEAR = {"target_modules": "all-linear"}
CASES = {
    "BERT": (bert, LINEAR, classified),
    "BERT, fused attention": (functools.partial(bert, "sdpa"), LINEAR, classified),
    "BERT, query and value": (bert, {"target_modules": ["query", "value"]}, classified),
    "BERT, dropout": (bert, {**LINEAR, "dropout": 0.1}, classified),
    "BERT, DoRA": (bert, {**LINEAR, "use_dora": True}, classified),
    "Llama": (llama, LINEAR, continued),
    "GPT-2, parts": (gpt2, {"target_modules": ["c_attn"], "slices": {"c_attn": ["q", "v"]}}, continued),
    "convolutions": (convolutions, {"target_modules": ["0", "3", "6"]}, seen),
}


def adapted(make, options):
    torch.manual_seed(0)
    model = make().eval()
    inject(model, LoRAConfig(r=4, **options))
    for dropout in (layer.lora_dropout for _, layer in adapted_layers(model)):
        if dropout is not None:
            dropout.train()
    return model


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


def checkpointed(model):
    return TrainingForward(model, checkpointing=True, offload=False, compile=False).on()


def traced(model, loss, *, context=nullcontext, forward=lambda model: nullcontext()):
    model, mode = copy.deepcopy(model).to("meta"), fake_mode()
    put_stand_ins(model, mode, torch.device("cpu"))

    def run():
        with forward(model):
            return loss(model)

    trained = [p for p in model.parameters() if p.requires_grad]
    return step_cost(model, run, lambda: AdamW(trained), mode, forward_context=context)


@pytest.mark.parametrize("context", [nullcontext, autocast], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_stand_ins_keeps_what_a_real_one_keeps(case, context):
    make, options, loss = CASES[case]
    model = adapted(make, options)

    def call():
        with context():
            return loss(model)

    real, planned = kept_bytes(model, call), traced(model, loss, context=context).kept
    assert abs(planned - real) <= max(256, real * 0.005)  # single numbers, such as a layer's epsilon


@pytest.mark.parametrize("case", ["BERT", "Llama"])
def test_the_peak_of_a_step_is_that_of_torchs_allocator(case):
    make, options, loss = CASES[case]
    model = adapted(make, options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained)
    for _ in range(2):  # the first makes the optimizer's state
        with torch.profiler.profile(profile_memory=True) as profile:
            out = loss(model)
            optimizer.zero_grad()
            out.backward()
            del out
            optimizer.step()
    planned = traced(model, loss)
    state = [t for own in optimizer.state.values() for t in own.values()]
    assert planned.optimizer == sum(t.numel() * t.element_size() for t in state)
    assert planned.gradients == sum(p.numel() * p.element_size() for p in trained)
    there = planned.gradients + planned.optimizer
    real = there + highest(profile)
    assert planned.peak - planned.weights == pytest.approx(real, rel=0.03)


def highest(profile):
    """Bytes at most above what was there before, in the order in which torch's allocator was asked."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_recomputed_blocks_are_not_kept():
    model = adapted(bert, LINEAR)
    plain = traced(model, classified)
    blocks = traced(model, classified, forward=checkpointed)
    with checkpointed(model):
        real = kept_bytes(model, lambda: classified(model))
    random = torch.get_rng_state().numel()  # which each block keeps, out of the dispatcher's sight
    assert blocks.kept + 3 * random == pytest.approx(real, rel=0.005)
    assert blocks.kept < plain.kept
    assert blocks.peak < plain.peak
    assert blocks.flops > plain.flops


@pytest.mark.parametrize("case", ["BERT", "BERT, fused attention", "Llama", "GPT-2, parts", "convolutions"])
def test_operations_are_those_that_torch_counts_of_a_real_step(case):
    """By torch's own counter on a plain model, where no arithmetic of ours can hide from it."""
    make, _, loss = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    planned = traced(model, loss)
    loss(model)  # what a first batch finds out
    cpu = "_scaled_dot_product_flash_attention_for_cpu"  # which torch's table leaves out
    fused = {getattr(torch.ops.aten, cpu): sdpa_flop.__wrapped__}
    fused[getattr(torch.ops.aten, f"{cpu}_backward")] = sdpa_backward_flop.__wrapped__
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        loss(model).backward()
    assert planned.flops == counter.get_total_flops()


def test_a_step_of_lora_takes_four_for_each_weight_and_token_and_six_for_each_of_its_own():
    """W0's own gradient is skipped, and the first layer's input, which is the batch, needs none."""
    tokens, width, deep, r = 32, 64, 5, 4
    x, model = torch.ones(tokens, width), nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(deep)))
    inject(model, LoRAConfig(r=r, target_modules=[str(i) for i in range(deep)]))
    lora = traced(model, lambda m: m(x).sum())
    weights, factors = deep * width * width, deep * 2 * width * r
    assert lora.forward == 2 * (weights + factors) * tokens
    assert lora.flops == (4 * weights + 6 * factors - 2 * width * (width + r)) * tokens


def test_a_deep_model_is_told_from_two_short_ones():
    alone = adapted(functools.partial(llama, 11), {"target_modules": ["layers.3.mlp.up_proj"]})
    assert depth_of(alone.to("meta")) is None, "blocks that are not alike are all run"
    model = adapted(functools.partial(llama, 11), LINEAR).to("meta")
    name, blocks = depth_of(model)
    assert (name, blocks) == ("model.layers", 11)
    short, longer = (traced(shorten(model, name, n), continued) for n in (SHORT, SHORT + 1))
    told, whole = scale(longer, short, blocks - SHORT - 1), traced(model, continued)
    for number in NUMBERS:  # a tensor of the batch, of some bytes, may be let go a moment earlier or later
        assert getattr(told, number) == pytest.approx(getattr(whole, number), rel=5e-3), number
