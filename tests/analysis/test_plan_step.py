"""A plan's step on stand-ins keeps, needs and computes what it does with numbers; its counts are the paper's."""

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
from lora_lightning import CausalLM, LoRAConfig, inject, save_adapter
from lora_lightning.commands.plan.block_scaling import SHORT, depth_of, scale, shorten
from lora_lightning.commands.plan.parameter_count import terms_of
from lora_lightning.commands.plan.step_cost import NUMBERS, step_cost
from lora_lightning.lora.formats.peft.save import adapter_file_bytes
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.activations import TrainingForward
from tests.factories import FAMILIES
from tests.lora.test_paper_counts import OF_C_ATTN, gpt

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
    model = copy.deepcopy(model).to("meta")

    def run():
        with context(), forward(model):
            return loss(model)

    def optimizer():
        return AdamW([p for p in model.parameters() if p.requires_grad])

    return step_cost(model, run, optimizer, torch.device("cpu"))


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


# ---- counts by the paper's formula, and sizes of files to the byte


HEADS = {"modules_to_save": ["classifier"], "bias": "lora_only", "dropout": 0.1}
PATTERNS = {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3}}
SIZED = {
    **{name: (name, {}) for name in FAMILIES},
    "DoRA": ("bert", {"use_dora": True}),
    "a start that is subtracted": ("bert", {"init": "pissa"}),
    "ranks of their own": ("bert", PATTERNS),
    "heads, biases and dropout": ("bert", {"target_modules": ["query"], **HEADS}),
}
ABOUT = {"base_model_name_or_path": "bert", "task_type": "SEQ_CLS"}


@pytest.mark.filterwarnings("ignore:PEFT")
@pytest.mark.parametrize("name", SIZED)
def test_the_adapters_file_has_the_size_that_was_planned(name, tmp_path):
    family, options = SIZED[name]
    make, about = FAMILIES[family].make, ABOUT if "modules_to_save" in options else {}
    with torch.device("meta"):
        bare = make()
        planned = inject(bare, LoRAConfig(r=2, **options), run_init=False)
        size = adapter_file_bytes(bare, **about)
    model = make()
    report = inject(model, LoRAConfig(r=2, **options))
    save_adapter(model, tmp_path / "adapter", **about)
    assert size == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (planned.trainable, planned.frozen) == (report.trainable, report.frozen)


def test_the_formulas_terms_are_what_their_own_numbers_give():
    """tests/lora/test_paper_counts.py holds the counts to the paper's."""
    with torch.device("meta"):
        model = gpt(1024, 24, 16)()
    report = inject(model, LoRAConfig(r=4, **OF_C_ATTN), run_init=False)
    (term,) = terms_of(model, report)
    assert (term.formula, term.is_square) == ("2 L d r = 2 x 2 x 24 x 1,024 x 4", True)
    assert term.factors == report.trainable == 393_216
    model = FAMILIES["bert"].make()
    report = inject(model, LoRAConfig(r=4, target_modules="all-linear", use_dora=True))
    terms = terms_of(model, report)
    for term in terms:
        assert term.factors == term.parts * term.count * (term.inputs + term.outputs) * term.r
    assert {term.is_square for term in terms} == {True, False}
    assert sum(term.factors + term.more for term in terms) == report.trainable
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 8, 3))
    report = inject(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    terms = terms_of(model, report)
    assert not any(term.is_matrix for term in terms), "convolutions are counted as they are"
    assert sum(term.factors for term in terms) == report.trainable
