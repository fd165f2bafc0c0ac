"""The kinds of layer, each in a small model, and the options that each takes: what `test_laws.py` asks the laws of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.models.beit import Attention as BeitAttention
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.factories import FAMILIES, HEADS, hf, move


class Net(nn.Module):
    """Linears with and without a bias, a norm with one, a head; wider than tall and taller than wide."""

    def __init__(self, narrow=12, wide=20, out=10):
        super().__init__()
        self.up = nn.Linear(narrow, wide)
        self.norm = nn.LayerNorm(wide)
        self.down = nn.Linear(wide, out, bias=False)
        self.square = nn.Linear(out, out)
        self.head = nn.Linear(out, 3)

    def forward(self, x):
        x = torch.tanh(self.up(x))
        x = self.down(self.norm(x))
        return self.head(torch.tanh(self.square(x)))


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


def inputs(dtype=torch.float32, seed=1, rows=7):
    return drawn(2, rows, 12, seed=seed).to(dtype)


def batches(dtype=torch.float32, count=3):
    return [inputs(dtype, seed=100 + i) for i in range(count)]


def square_loss(model, batch):
    return model(batch).double().square().mean()


shake = partial(move, size=0.1)
"""Move everything that trains, as a little training would: magnitudes and biases too."""


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on(x, model):
    """`x` in the dtype of the model."""
    return x.to(next(model.parameters()).dtype)


class Doubled(nn.Linear):
    """A subclass with a forward and an argument of its own."""

    def forward(self, tokens, *, factor=2.0):
        return factor * super().forward(tokens)


def run_doubled(model):
    return model[0](tokens=on(drawn(2, 6), model), factor=3.0).sum() + run_six(model)


class Padded(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


CONVS = {
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2),
    "1d circular": lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"),
    "1d grouped": lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2),
    "2d": lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0)),
    "2d reflect": lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), padding_mode="reflect"),
    "2d replicate": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, padding_mode="replicate"),
    "2d same": lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2),
    "2d circular": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, padding_mode="circular"),
    "2d grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "2d grouped, with a bias": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
    "2d that pads": lambda: Padded(4, 6, 3),
    "3d": lambda: nn.Conv3d(4, 6, 2, padding=1),
    "3d grouped": lambda: nn.Conv3d(4, 6, 3, padding=1, groups=2),
}


def conv(which):
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), CONVS[which]())


def run_conv(model, which):
    return model(on(drawn(2, 4, *[6] * int(which[0])), model))


IDS = torch.tensor([[1, 2, 2, 0], [8, 0, 5, 1]])


def embedding(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6, **kwargs), nn.Tanh(), nn.Linear(6, 3))


def bounded_embedding():
    model = embedding(max_norm=1.0)
    model(torch.arange(9))  # torch rewrites W0 here
    with torch.no_grad():
        model[0].weight.mul_(0.99)  # from now on it need not, in any dtype
    return model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def run_ids(model):
    out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


ONE_BLOCK = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GROUPED = {**ONE_BLOCK, "num_key_value_heads": 1, "vocab_size": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40, "dropout_rate": 0.0}
BART = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40, "max_position_embeddings": 32}
BART |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DEBERTA = {**ONE_BLOCK, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
gemma = partial(hf, "Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8, attn_implementation="eager")
t5 = partial(hf, "T5ForConditionalGeneration", **T5, pad_token_id=0, decoder_start_token_id=0)
bart = partial(hf, "BartForConditionalGeneration", **BART, pad_token_id=0)
deberta = partial(hf, "DebertaV2Model", **DEBERTA, vocab_size=40, initializer_range=0.4)


def run_seq2seq(model):
    return model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits


class Chain(nn.Module):
    """Goes through the layers that its head holds, and calls none of the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    def forward(self, x):
        x = self.body(x)
        for layer in self.head:
            x = layer(x.to(layer.weight)).to(x)
        return x + 0 * self.head[-1].weight.sum() + len(self.head)


def conv1d():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 6), nn.Tanh(), Conv1D(5, 12))
    nn.init.normal_(model[0].bias)
    return model


def in_parts():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


def run_six(model):
    return model(on(drawn(3, 5, 6), model))


SPECS = {
    "thirds": {"of": ["q", "k", "v"], "take": ["q", "v"]},
    "by head": {"of": ["q", "k", "v"], "take": ["v", "q"], "heads": 2},
    "unequal": {"of": ["q", "k", "v"], "sizes": [8, 2, 2], "take": ["k", "v"]},
    "one": {"of": ["gate", "up"], "take": ["up"]},
    "all": {"of": ["q", "k", "v"], "take": ["q", "k", "v"]},
}


class Experts(nn.Module):
    """Three experts in stacks; `is_transposed` says which way the matrices lie, as in transformers."""

    def __init__(self, transposed=False):
        super().__init__()
        self.is_transposed = transposed
        up, down = (3, 12, 6), (3, 6, 12)
        self.up = nn.Parameter(torch.randn(*(down if transposed else up)))
        self.bias = nn.Parameter(torch.randn(3, 12))
        self.down = nn.Parameter(torch.randn(*(up if transposed else down)))

    def forward(self, x):
        out = 0
        for expert in range(3):  # the parameter is read once for each expert, as in transformers' eager experts
            up, down = self.up[expert], self.down[expert]
            hidden = torch.tanh(x @ (up if self.is_transposed else up.T) + self.bias[expert])
            out = out + hidden @ (down if self.is_transposed else down.T)
        return out


class Mixture(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(6, 6)
        self.experts = Experts(transposed)
        self.mix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return self.experts(self.proj(x)) @ self.mix.T


class WithMatrix(nn.Linear):
    """A linear layer with a matrix of its own beside the weight."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.more = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x):
        return super().forward(x) + x @ self.more.T


WIDTH, NUM_HEADS = 8, 2


class Attention(nn.Module):
    """Gives self-attention, or attention to something else, in one tensor with its weights."""

    def __init__(self, cross=False, call=None, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(WIDTH, NUM_HEADS, **kwargs)
        for parameter in self.attn.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.cross, self.call = cross, call or {}

    def forward(self, q, k, v):
        call = {
            name: on(m, self) if name == "attn_mask" and m.is_floating_point() else m for name, m in self.call.items()
        }
        out, weights = self.attn(q, k if self.cross else q, v if self.cross else q, **call)
        return torch.cat([out.flatten(), torch.zeros(0).to(out) if weights is None else weights.flatten()])


class OwnAttention(nn.MultiheadAttention):
    """Reads weights itself."""

    def forward(self, x):
        x = nn.functional.linear(x, self.in_proj_weight)[..., : self.embed_dim]
        return nn.functional.linear(x, self.out_proj.weight) + self.out_proj(x)


class OwnLayer(nn.TransformerEncoderLayer):
    def forward(self, src):
        return self.linear2(torch.tanh(self.linear1(src)))


def alone(cls, *args, **kwargs):
    """One module in a model, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(cls(*args, **kwargs))


def encoder_layer(**kwargs):
    return alone(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True, dropout=0.0, **kwargs)


def run_attention(model):
    kdim, vdim, source = model.attn.kdim, model.attn.vdim, 5 if model.cross else 3
    return model(*(on(drawn(*shape), model) for shape in [(3, 4, WIDTH), (source, 4, kdim), (source, 4, vdim)]))


def masks(n=3, length=4):
    causal = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    padding = torch.zeros(n, length, dtype=torch.bool)
    padding[1, -1] = True
    return {
        "float": {"attn_mask": causal},
        "bool": {"attn_mask": causal.isinf(), "need_weights": False},
        "per head": {"attn_mask": drawn(n * NUM_HEADS, length, length)},
        "padding": {"key_padding_mask": padding},
        "both": {"key_padding_mask": padding, "attn_mask": causal.isinf(), "need_weights": False},
        "causal": {"attn_mask": causal, "is_causal": True, "need_weights": False},
    }


class Attended(nn.Module):
    """An attention and what surrounds it, each with biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x.mT).mT
        return self.up(self.norm(self.attention(x, x, x, need_weights=False)[0]))


def run_attended(model):
    return model(on(drawn(2, 3, 8), model))


EXPERTS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 8, "head_dim": 8, "num_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
}
"""Families that keep their experts as 3-D parameters."""


def experts_of(family, product):
    """One of them, with one of transformers' products over the stacks."""
    model = hf(f"{family}ForCausalLM", **GROUPED, num_experts_per_tok=2, **EXPERTS[family])
    model.set_experts_implementation(product)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


# Options, by the names that PEFT's users know.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dropout": {"dropout": 0.5},
    "dora": {"use_dora": True},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "dora-bias-all": {"use_dora": True, "bias": "all"},
    **{init: {"init": init} for init in ("kaiming", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "lora_ga")},
}
OF_NET: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"square": 1}, "alpha_pattern": {"up": 5.0}, "use_rslora": True, "init": "kaiming"},
    "dropout_pattern": {"dropout_pattern": {"up": 0.5}},
    "dora-dropout": {"use_dora": True, "dropout": 0.5},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"square": 2}},
    "lora_bias": {"lora_bias": True, "exclude_modules": ["down"]},
    "lora_bias-bias-all": {"lora_bias": True, "bias": "all", "exclude_modules": ["down"]},
    "bias-all-saved": {"bias": "all", "modules_to_save": ["head"]},
    "pissa-dora-rslora": {"init": "pissa", "use_dora": True, "use_rslora": True, "alpha_pattern": {"square": 3.0}},
    # is exported with ranks of 20, above W0's own
    "pissa-patterns": {"init": "pissa", "rank_pattern": {"square": 2, "down": 10}},
    "olora-all": {"init": "olora", "lora_bias": True, "bias": "all", "dropout": 0.3, "exclude_modules": ["down"]},
}
SUBTRACTED = ("orthogonal", "pissa", "pissa_niter_4", "olora", "lora_ga")
"""Inits that leave W0 alone and subtract what A and B were at first."""


@dataclass(frozen=True)
class Kind:
    """A model, one output of it, what is adapted there, and the options that it takes."""

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    fields: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ("plain",)
    peft: str = ""
    """Which way PEFT is a witness: `both`, `ours` where it opens ours alone, or none."""
    formula: bool = True
    """Whether all of the adapter is s B A on weights."""
    meta: bool = True
    """Whether filling it with a state dict brings all of it back."""


def at(*targets, **fields):
    return {"target_modules": [*targets], **fields}


def bare(*names, **fields):
    return at(target_parameters=[*names], **fields)


def kind_of_conv(which, *options):
    witness = "both" if which in ("1d", "2d", "3d") else ""  # PEFT's A knows neither padding modes nor groups
    return Kind(partial(conv, which), partial(run_conv, which=which), at("1"), ("plain", *options), witness)


def kind_of_attention(*targets, parts=(), **kwargs):
    fields = at(*targets, slices={"attn": list(parts)} if parts else {})
    peft = "ours" if targets == ("attn",) and not kwargs else ""
    return Kind(partial(Attention, **kwargs), run_attention, fields, peft=peft)


def kind_of_parameters(*names, transposed=False, peft=""):
    return Kind(partial(Mixture, transposed), run_six, bare(*names), peft=peft)


def tokens_of(make, run, rows, *targets, peft="", meta=True):
    return Kind(make, run, at(*targets, trainable_token_indices=rows), peft=peft, formula=False, meta=meta)


def kind_of_attended(make, *targets, peft="", **fields):
    return Kind(make, run_attended, at(*targets, **fields), peft=peft, formula=False)


def run_tokens(model):
    return model(torch.arange(12).view(2, 6)).logits


def run_family(model, name):
    return FAMILIES[name].run(model, next(model.parameters()).dtype)


BOTH, DORA = ("attn", "out_proj"), ("dora", "bias-all", "bias-lora_only", "dora-bias-all", "lora_bias")
STARTS = ("pissa", "olora", "orthogonal", "pissa_niter_4")


def kind_of_embedding(make, *options, peft="", formula=False, meta=True, targets=("0",)):
    return Kind(make, run_ids, at(*targets), ("plain", *options), peft=peft, formula=formula, meta=meta)


def kind_of_family(name, *options, **fields):
    """A model of `factories.py`; with `fields`, other things than s B A train too."""
    run = partial(run_family, name=name)
    return Kind(FAMILIES[name].build, run, fields, ("plain", *options), formula=not fields, meta=False)


def kind_of_experts(family, product):
    fields = at("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    return Kind(partial(experts_of, family, product), run_tokens, fields, formula=False, meta=False)


OF_CONV = {"1d": DORA, "2d": ("dropout", *DORA), "3d": DORA, "2d grouped, with a bias": ("lora_bias", "rslora")}
OF_CONV |= dict.fromkeys(["1d circular", "2d reflect", "2d grouped"], ("dora",))
CONV = {f"Conv{which}": kind_of_conv(which, *OF_CONV.get(which, ())) for which in CONVS}
EMBEDDING = {
    "Embedding": kind_of_embedding(embedding, "rslora", "dora", peft="both", formula=True),
    "Embedding with padding": kind_of_embedding(
        partial(embedding, padding_idx=0, scale_grad_by_freq=True), "dora", peft="both"
    ),
    "Embedding and Linear": kind_of_embedding(partial(embedding, padding_idx=0), peft="both", targets=("0", "2")),
    "Embedding of bounded norm": kind_of_embedding(bounded_embedding),
    "Embedding that is tied": kind_of_embedding(Tied, targets=("embed",)),
    "Gemma's Embedding": kind_of_embedding(gemma, targets=("embed_tokens",), peft="both", meta=False),
    "token rows": tokens_of(embedding, run_ids, [7, 1, 8]),
    "token rows beside a linear layer": tokens_of(embedding, run_ids, [7, 1, 8], "2"),
    "token rows with a tied head": tokens_of(Tied, run_ids, {"embed": [1, 5]}),
    "token rows of gemma": tokens_of(gemma, run_ids, [7, 1], "q_proj", peft="both", meta=False),
    "token rows of t5": tokens_of(t5, run_seq2seq, [1, 5], meta=False),
    "token rows of bart": tokens_of(partial(bart, scale_embedding=True), run_seq2seq, [1, 5], meta=False),
}
PARAMETER = {
    "Parameter of experts": kind_of_parameters("experts.up", "experts.down", peft="both"),
    "Parameter of experts, transposed": kind_of_parameters("experts.up", "experts.down", transposed=True, peft="both"),
    "Parameter of the model": kind_of_parameters("mix"),
    "Parameters of both": kind_of_parameters("mix", "experts.down", "up", transposed=True),
    "Parameters beside a module": Kind(
        Mixture, run_six, at("proj", target_parameters=["up", "down"], rank_pattern={"down": 1})
    ),
    "Parameters of a linear layer": Kind(
        partial(alone, WithMatrix, 6, 5), run_six, bare("weight", "more"), peft="both"
    ),
    "Parameters of an attention": Kind(Attention, run_attention, bare("in_proj_weight", "out_proj.weight")),
    "Parameters of an attention, unfused": Kind(
        partial(Attention, cross=True, kdim=5, vdim=6), run_attention, bare("v_proj_weight", "out_proj.weight")
    ),
    "Parameter that its parent reads": Kind(
        partial(alone, BeitAttention, 8, 2, qkv_bias=True), run_attended, bare("qkv.weight"), formula=False, meta=False
    ),
    "Parameter that an encoder reads whole": Kind(
        deberta, lambda m: m(IDS)[0], bare("rel_embeddings.weight"), formula=False, meta=False
    ),
    **{
        f"experts of {family}, {product}": kind_of_experts(family, product)
        for family, product in [*((f, "eager") for f in EXPERTS), ("Mixtral", "batched_mm"), ("GptOss", "grouped_mm")]
    },
}
ATTENTION = {
    "attention": kind_of_attention(*BOTH),
    "attention, in": kind_of_attention("attn"),
    "attention, out": kind_of_attention("out_proj"),
    "attention, batch_first": kind_of_attention(*BOTH, batch_first=True),
    "attention, no bias": kind_of_attention(*BOTH, bias=False),
    "attention, bias_kv": kind_of_attention(*BOTH, add_bias_kv=True, add_zero_attn=True),
    "attention, cross": kind_of_attention(*BOTH, cross=True),
    "attention, unfused": kind_of_attention(*BOTH, cross=True, kdim=5, vdim=6),
    "attention, unfused, in": kind_of_attention("attn", cross=True, kdim=5, vdim=6),
    "attention, unfused, out": kind_of_attention("out_proj", cross=True, kdim=5, vdim=6),
    "attention, no weights": kind_of_attention(*BOTH, call={"need_weights": False}),
    "attention, each head's weights": kind_of_attention(*BOTH, call={"average_attn_weights": False}),
    **{f"attention, {name}": kind_of_attention(*BOTH, call=call, batch_first=True) for name, call in masks().items()},
    "attention of q and v": kind_of_attention("attn", parts="qv"),
    "attention of k": kind_of_attention("attn", parts="k", cross=True),
    "attention of v, k and q, unfused": kind_of_attention("attn", parts="vkq", cross=True, kdim=5, vdim=6),
    "every bias beside conv and attention": kind_of_attended(Attended, "conv", "attention", bias="all", peft="ours"),
    "every bias beside out_proj and linear": kind_of_attended(
        Attended, "attention.out_proj", "up", bias="all", dropout_pattern={"up": 0.25}
    ),
    "attention with a copy of its out_proj": kind_of_attended(Attended, "up", modules_to_save=["attention.out_proj"]),
    "attention that reads its weights": kind_of_attended(partial(alone, OwnAttention, 8, 2), "0", "out_proj"),
    "encoder layer with a forward of its own": kind_of_attended(partial(alone, OwnLayer, 8, 2, 16), "linear2"),
    **{
        f"encoder layer, {name} saved": kind_of_attended(encoder_layer, "linear2", modules_to_save=[name])
        for name in ("linear1", "self_attn.out_proj", "self_attn")
    },
    "encoder layer, biases": kind_of_attended(encoder_layer, "linear1", bias="all"),
    "encoder layer, biases, norms first": kind_of_attended(
        partial(encoder_layer, norm_first=True), "linear1", bias="all"
    ),
}
KINDS: dict[str, Kind] = {
    "Linear": Kind(net, lambda m: m(on(inputs(), m)), {"r": 4, "alpha": 6.0}, tuple(OPTIONS | OF_NET), "both"),
    "Linear that doubles": Kind(partial(alone, Doubled, 6, 5), run_doubled, at("0"), formula=False),
    "Conv1D": Kind(conv1d, run_six, at("0", "2"), ("plain", "rslora", "dropout", *DORA[:3], *STARTS), "both"),
    **{
        f"Conv1D in parts, {name}": Kind(conv1d, run_six, at("0", slices={"0": SPECS[name]}), peft="ours")
        for name in ("thirds", "by head")
    },
    **{
        f"Linear in parts, {name}": Kind(
            in_parts, run_six, at("0", "2", slices={"0": spec}), ("plain", "rslora", "dropout"), "ours"
        )
        for name, spec in SPECS.items()
    },
    "copies in a list": Kind(Chain, run_six, at("body", modules_to_save=["head"]), formula=False),
    **CONV,
    **EMBEDDING,
    **PARAMETER,
    **ATTENTION,
    "own": kind_of_family("own", "rslora"),
    "encoder": kind_of_family("encoder", "rslora"),
    **{f"{name} and its head": kind_of_family(name, modules_to_save=[HEADS[name]]) for name in ("own", "encoder")},
}
CASES = [(kind, option) for kind, entry in KINDS.items() for option in entry.options]


def fields_of(kind, option):
    """What `LoRAConfig` is told."""
    options = OF_NET.get(option) if kind == "Linear" and option in OF_NET else OPTIONS[option]
    return copy.deepcopy({"r": 2, "alpha": 3.0, **KINDS[kind].fields, **(options or {})})
