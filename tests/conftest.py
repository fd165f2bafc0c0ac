"""Fixtures for all tests. Models and references are in `tests/factories.py`, a tiny run's files in `tests/tiny.py`."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import datasets
import hypothesis
import pytest
import torch
import wandb

from lora_lightning import LoRAConfig, LoRAModule, SequenceClassification, TextClassificationData, huggingface
from lora_lightning.cli.main import LoRACLI
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.lora.layers import fused_linear
from tests.factories import FAMILIES, Family
from tests.tiny import config_text, make_bert, make_reviews

hypothesis.settings.register_profile("lora", deadline=None, derandomize=True, max_examples=30, database=None)
hypothesis.settings.load_profile("lora")

logging.getLogger("lightning.pytorch").propagate = True  # else it depends on what was imported first: for caplog

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # it waits for seconds after each stream of Parquet files


fused_linear.FEW_ROWS = 0  # the small inputs of tests stand for large ones

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")

# By dtype, how far two ways of computing one output may be apart, relative to its largest entry.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def pytest_collection_modifyitems(items):
    """The longest file comes first: a worker that began it last would be at it long after the other has ended."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _wandb_services_are_not_handed_on():
    """A later test, or a process that it starts, would take over the service of this test's run, and its folder."""
    yield
    if wandb.run is not None:
        wandb.finish()  # teardown leaves it standing, as a run of a service that is gone
    if os.environ.pop("WANDB_SERVICE", None):
        wandb.teardown()


@pytest.fixture(autouse=True)
def _process_groups_are_not_handed_on():
    """A strategy of several processes leaves its group and its port to this process, and to those that it starts."""
    before = {name: os.environ.get(name) for name in RENDEZVOUS}
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(params=list(FAMILIES))
def family(request) -> Family:
    """Each small model in turn."""
    return FAMILIES[request.param]


@pytest.fixture(params=list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def tolerance(dtype) -> float:
    return TOLERANCE[dtype]


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
