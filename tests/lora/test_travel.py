"""Law: an adapter computes elsewhere what it computed at home: every family and every pair of options, four ways."""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning import LoRAConfig, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers
from tests.lora.directories import same_files
from tests.lora.laws import relative, stir
from tests.lora.test_families import FAMILIES, MOE, build

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "error:Found missing adapter keys")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

# What the parts are called in the models on which options meet.
PARTS = {
    "bert": {"linear": ["query", "value", "output.dense"], "embedding": "word_embeddings", "head": "classifier"},
    "vit": {"linear": ["q_proj", "v_proj", "fc2"], "head": "classifier", "conv": "projection"},
    "gpt2": {"linear": ["c_attn", "c_fc"], "embedding": "wte", "slices": {"c_attn": ["q", "v"]}},
    "mixtral": {"linear": ["q_proj", "v_proj"], "head": "lm_head", "experts": MOE},
}
# By name: a group, of which a model takes one option, and the fields for a model's parts.
OPTIONS = {
    "all linear": ("targets", lambda p: {"target_modules": "all-linear"}),
    "names": ("targets", lambda p: {"target_modules": p["linear"][:2]}),
    "regex": ("targets", lambda p: {"target_modules": rf".*\.({'|'.join(p['linear'])})"}),
    "excluded": ("targets", lambda p: {"target_modules": p["linear"], "exclude_modules": p["linear"][-1:]}),
    "one block": ("targets", lambda p: {"target_modules": p["linear"], "layers_to_transform": [1]}),
    "embedding": ("targets", lambda p: {"target_modules": [p["linear"][0], p["embedding"]]}),
    "conv": ("targets", lambda p: {"target_modules": [p["conv"]]}),
    "experts": ("targets", lambda p: {"target_modules": p["linear"], "target_parameters": p["experts"]}),
    "slices": ("targets", lambda p: {"target_modules": [*p["slices"]], "slices": p["slices"]}),
    "rslora": ("scale", lambda p: {"use_rslora": True}),
    "patterns": ("patterns", lambda p: {f"{of}_pattern": {p["linear"][0]: n} for of, n in (("rank", 3), ("alpha", 7))}),
    "dora": ("layer", lambda p: {"use_dora": True}),
    "lora_bias": ("layer", lambda p: {"lora_bias": True}),
    "pissa": ("layer", lambda p: {"init": "pissa"}),
    "olora": ("layer", lambda p: {"init": "olora"}),
    "orthogonal": ("layer", lambda p: {"init": "orthogonal"}),
    "gaussian": ("layer", lambda p: {"init": "gaussian"}),
    "bias all": ("bias", lambda p: {"bias": "all"}),
    "bias lora_only": ("bias", lambda p: {"bias": "lora_only"}),
    "head": ("head", lambda p: {"modules_to_save": [p["head"]]}),
    "tokens": ("tokens", lambda p: {"trainable_token_indices": {p["embedding"]: [1, 5]}}),
}
SUBTRACTED = ("pissa", "olora", "orthogonal")
CLASHES = [
    ({"embedding"}, {"tokens"}),  # of one matrix
    ({"embedding", "conv", "experts"}, {*SUBTRACTED, "lora_bias"}),
    ({"experts"}, {"dora", "bias all", "bias lora_only", "patterns"}),
    ({"slices"}, {"dora", *SUBTRACTED, "lora_bias"}),
    ({"orthogonal"}, {"patterns"}),  # an even rank
    ({"embedding", "conv"}, {"bias lora_only", "patterns"}),
    ({"gaussian"}, set(OPTIONS)),  # the usual init, by PEFT's name
]


def fields_of(case):
    """Fields of `LoRAConfig`; a `KeyError` where the model has no such part."""
    family, options = case
    if not options:
        return {"r": 2, **FAMILIES[family][2]}
    parts, fields = PARTS[family], {"r": 2, "target_modules": PARTS[family]["linear"]}
    for option in options:
        fields |= OPTIONS[option][1](parts)
    return fields


def pefts_fields(case):
    """The same for `peft.LoraConfig`, or None where PEFT has no such thing."""
    fields = {"target_modules": "all-linear", "lora_alpha": 3, **fields_of(case)}
    if fields.get("slices"):
        return None
    return {{"init": "init_lora_weights"}.get(name, name): value for name, value in fields.items()}


def able(family, options):
    try:
        return bool(fields_of((family, options)))
    except KeyError:
        return False


def meet(one, two):
    clash = any({one, two} <= a | b and {one, two} & a and {one, two} & b for a, b in CLASHES)
    return OPTIONS[one][0] != OPTIONS[two][0] and not clash


CHOICES = [*((name,) for name in OPTIONS), *(pair for pair in itertools.combinations(OPTIONS, 2) if meet(*pair))]
PAIRS = [(next(f for f in PARTS if able(f, o)), o) for o in CHOICES if any(able(f, o) for f in PARTS)]
WHOLE = [(family, ()) for family in FAMILIES]
"""Each family with its own adapter."""

TWICE = "PEFT counts the update of an attention's out_proj twice (its PR 3774)"
GROUPS = "PEFT trains A across a convolution's groups, which no weight of W0's shape can hold"
NOT_BY_PEFT = {
    **dict.fromkeys(["nn.Transformer", "torchvision vit"], TWICE),
    "whisper": "Whisper asks its convolution for a stride, which PEFT's layer does not have",
}


def not_by_peft(case):
    """What PEFT 0.21 cannot compute from any file, None where it can."""
    return None if case[1] else NOT_BY_PEFT.get(case[0])


def not_from_peft(case):
    """What PEFT 0.21 cannot write, None where it can."""
    if {"pissa", "olora"} & {*case[1]} and {"bias all", "bias lora_only", "head", "tokens"} & {*case[1]}:
        return "PEFT's conversion of an init writes A and B alone, and loses or refuses what else was trained"
    return GROUPS if case in [("convnext", ()), ("timm convnext", ())] else not_by_peft(case)


def cases(wanted, limit=lambda case: None):
    """Float32 and float64 in turn; `limit` says what PEFT cannot do."""
    chosen = []
    for at, case in enumerate(wanted):
        dtype = (torch.float32, torch.float64)[at % 2]
        marks = [pytest.mark.xfail(strict=True, reason=limit(case))] if limit(case) else []
        chosen.append(pytest.param(case, dtype, id=f"{case[0]}, {' + '.join(case[1])}, {dtype}", marks=marks))
    return pytest.mark.parametrize(("case", "dtype"), chosen)


@pytest.fixture(autouse=True)
def no_fused_kernel_and_no_model_card(monkeypatch):
    """torch's fused kernel for encoders goes past PEFT's adapters; PEFT's README takes longer than the adapter."""
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda self, folder: None)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def adapted(case, dtype):
    plain = build(case[0], dtype)
    model = copy.deepcopy(plain)
    inject(model, LoRAConfig(**{"alpha": 3.0, **fields_of(case)}))
    return plain, stir(model, size=0.1)


@torch.no_grad()
def run(case, model):
    return FAMILIES[case[0]][1](model)


def arrived(case, direction, got, home, plain, dtype):
    assert relative(got, home) <= TOLERANCE[dtype]
    assert relative(plain, home) > 1e-4, "the update shows"


@cases([*WHOLE, *PAIRS], not_by_peft)
def test_what_is_saved_is_what_is_loaded_by_us_and_by_peft(case, dtype, tmp_path):
    """By us to the bit: outputs, every tensor with its dtype, the settings of every layer, what trains, the files."""
    plain, model = adapted(case, dtype)
    again = copy.deepcopy(plain)
    load_adapter(again, save_adapter(model, tmp_path / "a"))
    arrived(case, "ours to ours", run(case, again), run(case, model), run(case, plain), dtype)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    arrived(case, "ours to PEFT", run(case, theirs), run(case, model), run(case, build(case[0], dtype)), dtype)
    if not set(case[1]) & set(SUBTRACTED):  # their directories hold the start too, as twice the rank
        assert torch.equal(run(case, again), run(case, model))
        assert described(again) == described(model)
        ours, theirs = adapter_tensors(model), adapter_tensors(again)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
        assert same_files(tmp_path / "a", save_adapter(again, tmp_path / "b"))


def described(model):
    layers = [(name, layer.lora_settings) for name, layer in adapted_layers(model)]
    return layers, [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@cases([case for case in [*WHOLE, *PAIRS] if pefts_fields(case)], not_from_peft)
def test_we_compute_from_pefts_directory_what_peft_computes(case, dtype, tmp_path):
    fields = pefts_fields(case)
    converted = fields.get("init_lora_weights") in ("pissa", "olora")
    dtype = torch.float32 if converted else dtype  # PEFT starts these in no wider one
    plain = build(case[0], dtype)
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**fields)).eval()
    if converted:
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = fields["init_lora_weights"]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    home = run(case, theirs)
    more = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")} if converted else {}
    theirs.save_pretrained(tmp_path / "theirs", **more)
    model = copy.deepcopy(plain)
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    arrived(case, "PEFT to ours", run(case, model), home, run(case, plain), dtype)
    there, back = (safetensors.torch.load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert {key for key in there if "lora_" in key} <= back.keys()  # less PEFT's copies of embeddings' W0
    assert all(torch.equal(there[key], back[key]) for key in there.keys() & back.keys()), "and goes back"


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [(t.shape, t.stride(), t.dtype) for t in flat if isinstance(t, torch.Tensor)]
        self.seen.append((str(func), tensors))
        return func(*args, **(kwargs or {}))


def operations(case, model):
    with Operations() as operations:
        run(case, model)
    return operations.seen


@cases([*WHOLE, *PAIRS])
def test_a_merged_model_opens_without_us_and_runs_the_plain_models_operations(case, dtype, tmp_path):
    """So its latency is the plain backbone's; benchmarks/latency.py times it."""
    family = case[0]
    plain, model = adapted(case, dtype)
    home = run(case, model)
    merge(model)
    if not case[1]:
        assert operations(case, model) == operations(case, plain)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path)
        again, found = type(plain).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        if family == "mixtral" and dtype == torch.float64:
            again.set_experts_implementation("eager")
    else:
        safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
        again = build(family, dtype)
        nn.init.zeros_(next(again.parameters()))
        safetensors.torch.load_model(again, str(tmp_path / "model.safetensors"))
    arrived(case, "merged", run(case, again.eval()), home, run(case, plain), dtype)
