"""`--budget` against arithmetic of its own: A is r by in, B out by r."""

from __future__ import annotations

import pytest
import torch
import yaml

from lora_lightning import LoRAConfig, LoRAError
from lora_lightning.commands.sweep.base_config import rank_for, trainable
from lora_lightning.commands.sweep.sweep import Request, Sweep
from tests.factories import bert
from tests.recipes.recipe import CONFIGS

HIDDEN, INNER, LAYERS = 16, 32, 2
SHAPES = {
    "query": [(HIDDEN, HIDDEN)],
    "value": [(HIDDEN, HIDDEN)],
    "intermediate.dense": [(HIDDEN, INNER)],
    "attention.output.dense": [(HIDDEN, HIDDEN)],
}
HEAD = HIDDEN * 3 + 3
SETS = [["query"], ["query", "value"], ["query", "intermediate.dense"], list(SHAPES)]


def by_hand(names, r):
    """LAYERS times r (in + out) for each matrix, and the head."""
    return HEAD + LAYERS * sum(r * (rows + columns) for name in names for rows, columns in SHAPES[name])


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_counts_are_those_by_hand_also_on_the_meta_device(names):
    config = LoRAConfig(r=3, target_modules=names, modules_to_save=["classifier"])
    with torch.device("meta"):
        model = bert()
    for backbone in (bert(), model):
        assert trainable(backbone, config) == by_hand(names, 3)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("names", SETS, ids="+".join)
@pytest.mark.parametrize("budget", [400, 1000, 1551, 2000])
def test_the_rank_is_the_nearest_that_its_layers_can_hold(names, budget):
    config = LoRAConfig(target_modules=names, modules_to_save=["classifier"])
    nearest = min(range(1, HIDDEN + 1), key=lambda r: (abs(by_hand(names, r) - budget), r))
    assert rank_for(bert(), config, budget) == nearest


def test_a_budget_that_one_rank_exceeds_twice_is_refused():
    config = LoRAConfig(target_modules=["query", "value"], modules_to_save=["classifier"])
    with pytest.raises(LoRAError, match=f"with r = 1 {by_hand(['query', 'value'], 1)} parameters train"):
        rank_for(bert(), config, 50)


def test_the_demo_is_opened_without_a_weight_and_the_wandb_files_ranks_are_those_that_its_budget_finds():
    file = yaml.safe_load((CONFIGS / "sweeps/matrices.yaml").read_text())
    sets = [yaml.safe_load(value) for value in file["parameters"]["model.lora"]["values"]]
    values = ",".join(str(own["target_modules"]).replace(" ", "").replace("'", "") for own in sets)
    grid = f"model.lora.target_modules={values}"
    demo = Sweep(Request(fit=["-c", str(CONFIGS / "demo.yaml")], grid=[grid], budget=300_000, plots=False))
    assert (demo.metric, demo.goal, demo.folder.name) == ("val/accuracy", "max", "demo-sweep")
    assert all(p.is_meta for p in demo.base.backbone.parameters())
    assert [own["r"] for own in sets] == list(demo.ranks.values())
    # 6 blocks of width 384: query takes 6 * 2 * 384 numbers a rank, the new head 384 * 2 + 2.
    assert demo.ranks["[query]"] == round((300_000 - 770) / (6 * 2 * 384))
