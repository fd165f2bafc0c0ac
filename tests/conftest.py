"""A tiny run, made once: a BERT on disk, a set, and what `fit` left behind."""

from types import SimpleNamespace

import pytest
import torch

from lora_lightning import LoRAConfig, LoRAModule, SequenceClassification, TextClassificationData, huggingface
from lora_lightning.cli import LoRACLI
from lora_lightning.data.splits import SplitConfig
from tests.tiny import config_text, make_bert, make_reviews


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """A run that forgets to name its folder leaves nothing in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    bert, reviews = make_bert(folder / "bert"), make_reviews(folder / "reviews.csv")
    config = folder / "run.yaml"
    config.write_text(config_text(bert, reviews))
    return SimpleNamespace(folder=folder, bert=str(bert), reviews=str(reviews), config=str(config))


@pytest.fixture(scope="session")
def trained(tiny):
    """The run folder of a fit through the command's own parser."""
    cli = LoRACLI(args=["fit", "--config", tiny.config, "--runs_dir", str(tiny.folder / "runs")])
    assert float(cli.trainer.callback_metrics["val/accuracy"]) > 0.85
    return tiny.folder / "runs" / "tiny" / "version_0"


@pytest.fixture
def make_module(tiny):
    def make(backbone=None, lora=None, **kwargs):
        torch.manual_seed(0)
        backbone = backbone or huggingface(tiny.bert, num_labels=2)
        lora = lora or LoRAConfig(r=4, modules_to_save=["classifier"])
        return LoRAModule(backbone, SequenceClassification(2), lora, **kwargs)

    return make


@pytest.fixture
def make_data(tiny):
    def make(**kwargs):
        options = {"batch_size": 16, "split": SplitConfig(validation=0.2, test=0.2, group_by="film")} | kwargs
        return TextClassificationData(tiny.reviews, tiny.bert, **options)

    return make
