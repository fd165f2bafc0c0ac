"""Bare parameters: matrices, and stacks of them such as a mixture's experts (`target_parameters`)."""

import torch

from lora_lightning import disabled, inject, merge
from lora_lightning.lora.layers import LoRAParameter
from tests.lora.kinds import Mixture, run_six
from tests.lora.laws import config, stir


def mixture(*names, **kwargs):
    model = Mixture()
    report = inject(model, config(target_modules=[], target_parameters=list(names), **kwargs))
    return stir(model), report


def test_the_parameter_stays_under_its_name_and_is_computed_once_in_a_forward(monkeypatch):
    model = Mixture()
    W0 = model.experts.up
    inject(model, config(target_modules=[], target_parameters=["up"]))
    assert model.state_dict(keep_vars=True)["experts.up"] is W0
    assert dict(model.named_parameters())["experts.up"] is W0
    calls, updated = [], LoRAParameter.updated_weights
    monkeypatch.setattr(LoRAParameter, "updated_weights", lambda self: calls.append(1) or updated(self))
    run_six(model)
    assert len(calls) == 1
    assert not torch.equal(stir(model).experts.up, W0)
    with disabled(model):
        assert model.experts.up is W0


def test_reports_call_a_parameter_by_its_name():
    model, report = mixture("up", "mix")
    assert {row.module for row in report.modules} == merge(model).kept.keys() == {"experts.up", "mix"}


def test_a_state_dict_is_assigned():
    (model, _), (again, _) = mixture("up", "down"), mixture("up", "down")
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run_six(again), run_six(model))
    assert again.to(torch.float64).experts.up.dtype == torch.float64
