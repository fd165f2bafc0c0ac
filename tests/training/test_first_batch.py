"""An export finds its probe in whatever loaders Lightning takes, and in nothing that is no batch."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning import ExportAtEnd, FreezeBase, LoRAConfig, LoRAError
from lora_lightning.export.probe_batch import first_batch, probe_from
from lora_lightning.training.trainer import LoRATrainer
from tests.training.test_module import Vision, loader, trainer_of

X, OTHER = torch.arange(12.0).view(2, 6), torch.zeros(2, 6)


class Stream(IterableDataset):
    """Rows without a number of them."""

    def __init__(self, x=X):
        self.x = x

    def __iter__(self):
        yield from ({"x": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(self.x))


def stream(x=X):
    return DataLoader(Stream(x), batch_size=2)


def empty():
    return DataLoader(Stream(X[:0]))


class Data(LightningDataModule):
    """Loaders as they are given, and no hook for those that are not."""

    def __init__(self, train, **val):
        super().__init__()
        self.train_dataloader = lambda: train
        if val:
            self.val_dataloader = lambda: val["val"]


FOUND = {
    "a stream for validation": (stream(OTHER), {"val": stream()}),
    "no validation hook": (stream(), {}),
    "None for validation": (stream(), {"val": None}),
    "no validation loaders": (stream(), {"val": []}),
    "an empty stream for validation": (stream(), {"val": empty()}),
    "a dict of loaders": ({"a": stream(), "b": stream(OTHER)}, {}),
    "lists in a dict": ({"a": [empty(), stream()]}, {}),
    "loaders combined": (CombinedLoader([stream(), stream(OTHER)], "sequential"), {}),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_first_batch_that_any_loader_gives_is_the_probe(case, make_module):
    train, val = FOUND[case]
    batch = LoRATrainer(logger=False, accelerator="cpu")._probe(
        make_module(Vision(), LoRAConfig(r=2)), Data(train, **val)
    )
    assert torch.equal(batch["x"], X)
    assert torch.equal(batch["labels"], torch.tensor([0, 1]))


def test_no_batch_at_all_leaves_the_probe_to_the_model(make_module):
    trainer = LoRATrainer(logger=False, accelerator="cpu")
    assert trainer._probe(make_module(Vision(), LoRAConfig(r=2)), Data(empty(), val=empty())) is None
    assert trainer._probe(make_module(Vision(), LoRAConfig(r=2)), LightningDataModule()) is None


class Once:
    """A loader of one's own, for one batch."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        yield self.batch


UNNAMED = {
    "a tuple of Tensor, Tensor": (X, torch.tensor([0, 1])),
    "a list of Tensor": [X],
    "a Tensor": X,
    "a dict": {0: X},
}


@pytest.mark.parametrize("said", UNNAMED)
def test_a_batch_that_names_no_arguments_is_one_clear_error_or_the_models_own_example(said, make_module):
    module = make_module(Vision(), LoRAConfig(r=2))
    with pytest.raises(
        LoRAError, match=rf"first is {said}: let collate_fn return a dict, or give the module an exampl"
    ):
        first_batch([Once(UNNAMED[said])], module)
    module.example_input_array = X
    assert first_batch([Once(UNNAMED[said])], module) is None
    assert torch.equal(probe_from(module.backbone, module.task, None, module.example_input_array).inputs["x"], X)


@pytest.mark.parametrize("case", ["a stream for validation", "no validation hook", "loaders in a dict"])
def test_export_at_end_finds_its_probe_in_the_fits_loaders(case, tmp_path, make_module):
    train, val = {
        "a stream for validation": (loader(), [stream()]),
        "no validation hook": (stream(), []),
        "loaders in a dict": (loader(), [{"a": stream()}]),
    }[case]
    callbacks = [FreezeBase(show_table=False), ExportAtEnd(output_dir=str(tmp_path / "out"))]
    trainer = trainer_of(tmp_path, logger=True, callbacks=callbacks, enable_checkpointing=False)
    trainer.fit(make_module(Vision(), LoRAConfig(r=2)), train, *val)
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


def test_an_example_of_ones_own_goes_to_where_the_model_is(make_module):
    """The meta device stands for another card."""
    backbone = nn.Linear(6, 2, device="meta")
    assert probe_from(backbone, make_module().task, None, X).inputs["input"].is_meta
