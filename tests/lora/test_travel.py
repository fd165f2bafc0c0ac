"""Law: an adapter computes elsewhere what it computed at home. Families x options, in three directions.

Every pair of options that can be had at once is tried on some family; every family with every option is marked slow.
"""

from __future__ import annotations

import copy

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, merge, save_adapter
from tests.lora import travellers
from tests.lora.coverage import note_travel
from tests.lora.laws import relative, stir
from tests.lora.travellers import (
    TRAVELLERS,
    beyond_peft,
    build,
    every_family_with_every_option,
    every_pair_once,
    pefts,
    run,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PAIRS = every_pair_once()
FULL = [case for case in every_family_with_every_option() if case not in PAIRS]


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
def test_peft_computes_from_our_directory_what_we_compute(case, dtype, tmp_path):
    family = case[0]
    plain, model = adapted(case, dtype)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    arrived(case, "ours to PEFT", run(family, theirs), run(family, model), run(family, plain), dtype)


@cases(lambda case: pefts(case) is not None, beyond_peft)
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
    arrived(case, "PEFT to ours", run(family, model), home, run(family, plain), dtype)


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
