"""Who travels: small models of many families, the options that an adapter can have, and which of them meet."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests.lora.test_families import FAMILIES, GROUPED, MOE, logits


@dataclass(frozen=True, kw_only=True)
class Traveller:
    """A family, and what its parts are called."""

    linear: tuple[str, ...] = ()
    """Ends of names of linear layers."""
    conv: tuple[str, ...] = ()
    head: str = ""
    """What `modules_to_save` trains."""
    embedding: str = ""
    experts: tuple[str, ...] = ()
    slices: tuple[tuple[str, tuple[str, ...]], ...] = ()
    blocks: bool = True
    """Whether there is a block 1."""
    biased: bool = False
    """Whether every linear layer has a bias."""
    transformers: bool = True
    attention: bool = False
    """Whether it holds an `nn.MultiheadAttention`."""

    @property
    def targets(self) -> list[str]:
        return list(self.linear or self.conv)


QV = ("q_proj", "v_proj", "down_proj")
BERTS = {"linear": ("query", "value", "output.dense"), "embedding": "word_embeddings", "biased": True}
TRAVELLERS = {
    "llama": Traveller(linear=QV, head="lm_head", embedding="embed_tokens"),
    "qwen2": Traveller(linear=QV, head="lm_head", embedding="embed_tokens"),
    "qwen3": Traveller(linear=QV, head="lm_head"),
    "gemma": Traveller(linear=QV),
    "gemma2": Traveller(linear=QV),
    "gemma3 with its embedding": Traveller(linear=QV, embedding="embed_tokens"),
    "mistral": Traveller(linear=("q_proj", "v_proj", "up_proj"), head="lm_head", embedding="embed_tokens"),
    "mixtral": Traveller(linear=("q_proj", "v_proj", "o_proj"), head="lm_head", experts=tuple(MOE)),
    "phi": Traveller(linear=("q_proj", "v_proj", "fc2"), head="lm_head", biased=True),
    "phi3 in parts": Traveller(
        linear=("qkv_proj", "o_proj", "down_proj"),
        head="lm_head",
        slices=(("qkv_proj", ("q", "v")), ("gate_up_proj", ("up",))),
    ),
    "gpt2": Traveller(
        linear=("attn.c_attn", "c_fc", "mlp.c_proj"), embedding="wte", slices=(("c_attn", ("q", "v")),), biased=True
    ),
    "gpt-neox": Traveller(
        linear=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
        head="lm_head",
        slices=(("query_key_value", ("q", "v")),),
        biased=True,
    ),
    "opt": Traveller(linear=("q_proj", "v_proj", "fc2"), embedding="embed_tokens", biased=True),
    "bert": Traveller(**BERTS, head="classifier"),
    "roberta": Traveller(**BERTS, head="classifier"),
    "deberta-v2": Traveller(**{**BERTS, "linear": ("query_proj", "value_proj", "output.dense")}, head="classifier"),
    "t5": Traveller(linear=("q", "v", "wo"), embedding="shared"),
    "bart": Traveller(linear=("q_proj", "v_proj", "fc2"), biased=True, blocks=False),
    "vit": Traveller(linear=("q_proj", "v_proj", "fc2"), conv=("projection",), head="classifier", biased=True),
    "resnet": Traveller(conv=("convolution",), head="classifier", blocks=False),
    "convnext": Traveller(linear=("pwconv1", "pwconv2"), conv=("patch_embeddings",), head="classifier", biased=True),
    "clip": Traveller(linear=("q_proj", "v_proj", "fc2"), conv=("patch_embedding",), embedding="token_embedding"),
    "whisper": Traveller(linear=("q_proj", "v_proj", "fc2"), conv=("conv1", "conv2"), blocks=False),
    "nn.Transformer": Traveller(
        linear=("linear1", "linear2"), head="head", embedding="embed", biased=True, transformers=False, attention=True
    ),
    "timm vit": Traveller(
        linear=("qkv", "fc1", "fc2"),
        conv=("patch_embed.proj",),
        head="head",
        slices=(("qkv", ("q", "v")),),
        biased=True,
        transformers=False,
    ),
    "timm resnet": Traveller(conv=("conv2", "downsample.1"), head="fc", blocks=False, transformers=False),
    "timm convnext": Traveller(conv=("mlp.fc1", "mlp.fc2"), head="head.fc", blocks=False, transformers=False),
    "torchvision shufflenet": Traveller(conv=("branch2.0", "branch2.5"), head="fc", blocks=False, transformers=False),
    "torchvision vit": Traveller(
        linear=("mlp.0", "mlp.3"), conv=("conv_proj",), blocks=False, biased=True, transformers=False, attention=True
    ),
}
MORE = {"gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=8)), logits)}


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights each time, in eval mode."""
    return copy.deepcopy(_built(family, dtype))


@functools.cache
def _built(family: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = (MORE.get(family) or FAMILIES[family])[0]().to(dtype)
    if family == "mixtral" and dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.fill_(1.0)  # 1e-6 at first: no adapter behind it would count
            elif family == "torchvision shufflenet" and name == "fc.bias":
                parameter.zero_()  # all of the output at first
    return model.eval().requires_grad_(False)


@torch.no_grad()
def run(family: str, model: nn.Module) -> Tensor:
    return (MORE.get(family) or FAMILIES[family])[1](model)


# ---- options: our fields and PEFT's

Fields = Callable[[Traveller], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way in which an adapter can be."""

    group: str
    """Two of one group exclude each other."""
    ours: Fields
    pefts: Fields | None = None
    """None where PEFT has no such thing."""
    fits: Callable[[Traveller], bool] = lambda t: bool(t.linear)
    peft_fits: Callable[[Traveller], bool] = lambda t: True


def _both(group: str, fields: Fields, **more: Any) -> Option:
    return Option(group=group, ours=fields, pefts=fields, **more)


def _init(name: str) -> Option:
    return Option(group="layer", ours=lambda t: {"init": name}, pefts=lambda t: {"init_lora_weights": name})


OPTIONS = {
    # which modules
    "all linear": _both("targets", lambda t: {"target_modules": "all-linear"}, peft_fits=lambda t: t.transformers),
    "names": _both("targets", lambda t: {"target_modules": t.targets[:2]}, fits=lambda t: True),
    "regex": _both("targets", lambda t: {"target_modules": rf".*\.({'|'.join(t.targets)})"}),
    "excluded": _both("targets", lambda t: {"target_modules": t.targets, "exclude_modules": t.targets[-1:]}),
    "one block": _both(
        "targets",
        lambda t: {"target_modules": t.targets, "layers_to_transform": [1]},
        fits=lambda t: t.blocks and bool(t.linear),
        peft_fits=lambda t: t.transformers,  # PEFT wants a name before that of the blocks' list
    ),
    "embedding": _both(
        "targets", lambda t: {"target_modules": [t.targets[0], t.embedding]}, fits=lambda t: bool(t.embedding)
    ),
    "conv": _both("targets", lambda t: {"target_modules": list(t.conv)}, fits=lambda t: bool(t.conv)),
    "experts": _both(
        "targets",
        lambda t: {"target_modules": t.targets, "target_parameters": list(t.experts)},
        fits=lambda t: bool(t.experts),
    ),
    "slices": Option(
        group="targets",
        ours=lambda t: {
            "target_modules": [name for name, _ in t.slices],
            "slices": {name: list(parts) for name, parts in t.slices},
        },
        fits=lambda t: bool(t.slices),
    ),
    # which scale
    "rslora": _both("scale", lambda t: {"use_rslora": True}, fits=lambda t: True),
    "patterns": _both("patterns", lambda t: {"rank_pattern": {t.targets[0]: 3}, "alpha_pattern": {t.targets[0]: 7}}),
    # what more is trained in each layer, or how it starts
    "dora": _both("layer", lambda t: {"use_dora": True}, fits=lambda t: True),
    "lora_bias": _both("layer", lambda t: {"lora_bias": True}, fits=lambda t: t.biased),
    **{name: _init(name) for name in ("pissa", "olora", "orthogonal", "gaussian")},
    # which biases, and what beside the layers
    "bias all": _both("bias", lambda t: {"bias": "all"}, fits=lambda t: t.biased),
    "bias lora_only": _both("bias", lambda t: {"bias": "lora_only"}, fits=lambda t: t.biased),
    "head": _both("head", lambda t: {"modules_to_save": [t.head]}, fits=lambda t: bool(t.head)),
    "tokens": _both(
        "tokens", lambda t: {"trainable_token_indices": {t.embedding: [1, 5]}}, fits=lambda t: bool(t.embedding)
    ),
}
STARTS = ("pissa", "olora", "orthogonal")
CLASHES = [
    ({"embedding"}, {"tokens"}),  # of one matrix
    ({"embedding", "conv", "experts"}, {*STARTS, "lora_bias", "gaussian"}),
    ({"experts"}, {"dora", "bias all", "bias lora_only", "patterns"}),
    ({"slices"}, {"dora", *STARTS, "lora_bias"}),
    ({"orthogonal"}, {"patterns"}),  # an even rank
    ({"embedding", "conv"}, {"bias lora_only", "patterns"}),
]


def meet(one: str, two: str) -> bool:
    """Whether two options can be had at once."""
    if "gaussian" in (one, two):
        return False  # the usual start, by PEFT's name
    clash = any((one in a and two in b) or (two in a and one in b) for a, b in CLASHES)
    return OPTIONS[one].group != OPTIONS[two].group and not clash


Case = tuple[str, tuple[str, ...]]


def not_by_peft(case: Case) -> str | None:
    """What PEFT 0.21 cannot compute from any file, None where it can."""
    family, options = case
    if "all linear" in options and TRAVELLERS[family].attention:
        return "PEFT counts the update of an attention's out_proj twice (its PR 3774)"
    if family == "whisper" and "conv" in options:
        return "Whisper asks its convolution for a stride, which PEFT's layer does not have"
    return None


def not_from_peft(case: Case) -> str | None:
    """What PEFT 0.21 cannot write, None where it can."""
    family, options = case
    if family.startswith("gpt2") and "olora" in options:
        return "PEFT's olora takes a Conv1D's weight for a Linear's"
    if not {"pissa", "olora"} & {*options}:
        return not_by_peft(case)
    if {"bias all", "bias lora_only"} & {*options}:
        return "PEFT converts no adapter with biases: it loads the start as a second one"
    if {"head", "tokens"} & {*options}:
        return "PEFT's conversion writes A and B alone and loses what else was trained"
    return None


def every_pair_once() -> list[Case]:
    """Each pair of options that can meet, on the family that has travelled least; each option alone where none can."""
    used: Counter[str] = Counter()
    cases: list[Case] = []
    pairs = [pair for pair in itertools.combinations(OPTIONS, 2) if meet(*pair)]
    for pair in [*((name,) for name in OPTIONS), *pairs]:
        able = [name for name, t in TRAVELLERS.items() if _able(t, pair)]
        if able:
            family = min(able, key=lambda name: used[name])
            used[family] += 1
            cases.append((family, pair))
    return cases


def _able(t: Traveller, options: tuple[str, ...]) -> bool:
    if t.attention and "all linear" in options and any(OPTIONS[o].group == "layer" for o in options):
        return False  # an attention has the plain form alone
    return all(OPTIONS[o].fits(t) for o in options)


def every_family_with_every_option() -> list[Case]:
    return [(name, (o,)) for name, t in TRAVELLERS.items() for o, option in OPTIONS.items() if option.fits(t)]


def ours(case: Case) -> dict[str, Any]:
    """Fields of `LoRAConfig`."""
    family, options = case
    return _fields(TRAVELLERS[family], [OPTIONS[o].ours for o in options])


def pefts(case: Case) -> dict[str, Any] | None:
    """Fields of `peft.LoraConfig`, None where PEFT cannot."""
    family, options = case
    t = TRAVELLERS[family]
    chosen = [OPTIONS[o] for o in options]
    if any(o.pefts is None or not o.peft_fits(t) for o in chosen):
        return None
    return _fields(t, [o.pefts for o in chosen if o.pefts])


def _fields(t: Traveller, options: list[Fields]) -> dict[str, Any]:
    fields: dict[str, Any] = {"r": 2, "target_modules": t.targets}
    for option in options:
        fields |= option(t)
    return fields
