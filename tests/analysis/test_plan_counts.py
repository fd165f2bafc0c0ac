"""A plan's counts: the paper's, by the paper's formula, and sizes of files to the byte."""

from __future__ import annotations

import pytest
import torch

from lora_lightning import LoRAConfig, inject, save_adapter
from lora_lightning.commands.plan.parameter_count import terms_of
from lora_lightning.lora.formats.peft.save import adapter_file_bytes
from tests.factories import FAMILIES
from tests.lora.test_paper_counts import OF_C_ATTN, gpt

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


def test_the_papers_formula_has_a_runs_numbers():
    """tests/lora/test_paper_counts.py holds the counts to the paper's."""
    with torch.device("meta"):
        model = gpt(1024, 24, 16)()
    report = inject(model, LoRAConfig(r=4, **OF_C_ATTN), run_init=False)
    (term,) = terms_of(model, report)
    assert term.formula == "2 L d r = 2 x 2 x 24 x 1,024 x 4"
    assert term.is_square
    assert term.factors == report.trainable == 393_216


def test_the_formulas_terms_are_what_their_own_numbers_give():
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
