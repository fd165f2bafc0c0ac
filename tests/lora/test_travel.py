"""Law: an adapter computes elsewhere what it computed at home. Families x options, in four directions.

Every pair of options that can be had at once is tried on some family; every family with every option is marked slow.
"""

from __future__ import annotations

import copy

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning import LoRAConfig, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers
from tests.factories import folded
from tests.lora import travellers
from tests.lora.coverage import note_travel
from tests.lora.directories import same_files
from tests.lora.laws import relative, stir
from tests.lora.travellers import (
    TRAVELLERS,
    build,
    every_family_with_every_option,
    every_pair_once,
    not_by_peft,
    not_from_peft,
    pefts,
    run,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PAIRS = every_pair_once()
FULL = [case for case in every_family_with_every_option() if case not in PAIRS]


@pytest.fixture(autouse=True)
def no_fused_kernel():
    """torch's fused kernel for encoders in eval goes past PEFT's adapters."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def cases(wanted=lambda case: True, limit=lambda case: None):
    """Float32 and float64 in turn; `limit` says what PEFT cannot do."""
    chosen = []
    for cells, speed in ((PAIRS, []), (FULL, [pytest.mark.slow])):
        for at, case in enumerate(cell for cell in cells if wanted(cell)):
            dtype = (torch.float32, torch.float64)[at % 2]
            name = f"{case[0]}, {' + '.join(case[1])}, {str(dtype).removeprefix('torch.')}"
            marks = [*speed, *([pytest.mark.xfail(strict=True, reason=limit(case))] if limit(case) else [])]
            chosen.append(pytest.param(case, dtype, id=name, marks=marks))
    return pytest.mark.parametrize(("case", "dtype"), chosen)


def adapted(case, dtype):
    """The plain model, and ours as if trained."""
    plain = build(case[0], dtype)
    model = copy.deepcopy(plain)
    inject(model, LoRAConfig(**{"alpha": 3.0, **travellers.ours(case)}))
    return plain, stir(model, size=0.1)


def arrived(case, direction, got, home, plain, dtype):
    assert relative(got, home) <= TOLERANCE[dtype]
    assert relative(plain, home) > 1e-4, "the adapter counts"
    for option in case[1]:
        note_travel(family=case[0], option=option, direction=direction)


@pytest.fixture(autouse=True)
def no_model_card(monkeypatch):
    """PEFT's README beside the adapter takes longer than the adapter."""
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda self, folder: None)


@cases()
def test_what_is_saved_is_what_is_loaded(case, dtype, tmp_path):
    """To the bit: outputs, every tensor with its dtype, the settings of every layer, what trains, the files."""
    family = case[0]
    plain, model = adapted(case, dtype)
    again = copy.deepcopy(plain)
    load_adapter(again, save_adapter(model, tmp_path / "a"))
    arrived(case, "ours to ours", run(family, again), run(family, model), run(family, plain), dtype)
    if not set(case[1]) & set(travellers.STARTS):  # their directories hold the start too, as twice the rank
        assert torch.equal(run(family, again), run(family, model))
        assert described(again) == described(model)
        ours, theirs = adapter_tensors(model), adapter_tensors(again)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
        assert same_files(tmp_path / "a", save_adapter(again, tmp_path / "b"))


def described(model):
    layers = [(name, layer.lora_settings) for name, layer in adapted_layers(model)]
    return layers, [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@cases(limit=not_by_peft)
def test_peft_computes_from_our_directory_what_we_compute(case, dtype, tmp_path):
    family = case[0]
    plain, model = adapted(case, dtype)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    arrived(case, "ours to PEFT", run(family, theirs), run(family, model), run(family, plain), dtype)


@cases(lambda case: pefts(case) is not None, not_from_peft)
def test_we_compute_from_pefts_directory_what_peft_computes(case, dtype, tmp_path):
    family, fields = case[0], pefts(case)
    converted = fields.get("init_lora_weights") in ("pissa", "olora")
    dtype = torch.float32 if converted else dtype  # PEFT starts these in no wider one
    plain = build(family, dtype)
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**{"lora_alpha": 3, **fields})).eval()
    if converted:
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = fields["init_lora_weights"]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    home = run(family, theirs)
    more = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")} if converted else {}
    theirs.save_pretrained(tmp_path / "theirs", **more)
    model = copy.deepcopy(plain)
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    arrived(case, "PEFT to ours", run(family, model), home, run(family, plain), dtype)
    there, back = (safetensors.torch.load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert {key for key in there if "lora_" in key} <= back.keys()  # less PEFT's copies of embeddings' W0
    assert all(torch.equal(there[key], back[key]) for key in there.keys() & back.keys()), "and goes back"


@cases()
def test_a_merged_model_opens_without_us(case, dtype, tmp_path):
    family = case[0]
    plain, model = adapted(case, dtype)
    home = run(family, model)
    merge(model)
    if TRAVELLERS[family].transformers:
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
    arrived(case, "merged", run(family, again.eval()), home, run(family, plain), dtype)


# ---- what the merged model costs


class Operations(TorchDispatchMode):
    """Every operation that runs, with the shapes, strides and types that it runs on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [(t.shape, t.stride(), t.dtype) for t in flat if isinstance(t, torch.Tensor)]
        self.seen.append((str(func), tensors))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", TRAVELLERS)
def test_a_merged_model_runs_the_plain_models_operations(family):
    """So its latency is the plain backbone's; benchmarks/latency.py times it."""
    able = [case for case in every_family_with_every_option() if case[0] == family]
    plain, model = adapted(able[-1], torch.float32)
    merge(model)
    counted = []
    for each in (plain, model):
        with Operations() as operations:
            run(family, each)
        counted.append(operations.seen)
    assert len(counted[0]) > 10
    assert counted[0] == counted[1]


# ---- where PEFT is wrong, the formula is the witness


@pytest.mark.parametrize("family", [name for name, t in TRAVELLERS.items() if t.attention])
def test_an_attention_that_peft_counts_twice_is_the_formula(family, tmp_path):
    case = family, ("all linear",)
    plain, model = adapted(case, torch.float64)
    save_adapter(model, tmp_path)
    scales = {name: layer.lora_settings.scale for name, layer in adapted_layers(model)}
    witness = run(family, folded(plain, model, scales))
    arrived(case, "ours to the formula", run(family, model), witness, run(family, plain), torch.float64)
    again = copy.deepcopy(plain)
    load_adapter(again, tmp_path)
    arrived(case, "ours to the formula", run(family, again), witness, run(family, plain), torch.float64)
    merge(model)
    arrived(case, "merged", run(family, model), witness, run(family, plain), torch.float64)


def test_the_matrix_is_as_large_as_it_says():
    assert len({family for family, _ in PAIRS}) >= 25
    assert {option for _, options in PAIRS for option in options} == set(travellers.OPTIONS)
    assert len([case for case in PAIRS if len(case[1]) == 2]) > 100
