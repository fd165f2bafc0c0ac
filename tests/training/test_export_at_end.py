"""Exporting as a fit ends: what cannot be is said before it, and a probe is found in whatever loaders there are."""

import json

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning import ExportAtEnd, FreezeBase, LoRAConfig, LoRAError
from lora_lightning.export.probe_batch import first_batch, loaders_of
from tests.factories import export_of
from tests.training.small import Vision, fit, loader, trainer_of

X, OTHER = torch.arange(12.0).view(2, 6), torch.zeros(2, 6)


MEANINGLESS = {
    "unknown export format 'adaptor'; did you mean 'adapter'": {"formats": ["adaptor"]},
    "unknown export format 'merge'; did you mean 'merged'": {"formats": "adapter,merge"},
    "export writes no ONNX: .* docs/export.md": {"formats": "onnx"},
    "no export format given: name some of adapter, merged": {"formats": []},
    "dtype must be auto, float32, bfloat16, float16, got 'float23'; did you mean": {"dtype": "float23"},
    "serving must be 'vllm' or left out, got 'tgi'": {"serving": "tgi"},
    "max_shard_size must be bytes or a size such as 5GB, got '5 pieces'": {"max_shard_size": "5 pieces"},
    "max_shard_size must be bytes or a size such as 5GB, got 0": {"max_shard_size": 0},
    "a form of the adapter, got the formats merged: add adapter": {"formats": ["merged"], "serving": "vllm"},
}


@pytest.mark.parametrize("said", MEANINGLESS)
def test_an_export_that_means_nothing_is_refused_before_any_fit_and_by_export_alike(said, tmp_path, make_module):
    with pytest.raises(LoRAError, match=said):
        ExportAtEnd(**MEANINGLESS[said])
    module = make_module(Vision(), LoRAConfig(r=2))
    with pytest.raises(LoRAError, match=said):
        export_of(module, tmp_path / "out", {"x": X}, **MEANINGLESS[said])
    assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_be_is_told_before_the_first_step(tmp_path, make_module):
    class Steps(Callback):
        def on_train_batch_start(self, *args):
            raise AssertionError("it trained")

    def refused(said, lora=LoRAConfig(r=2), **options):  # noqa: B008
        with pytest.raises(LoRAError, match=said):
            fit(tmp_path, make_module(Vision(), lora), Steps(), ExportAtEnd(**options), logger=True)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    refused("holds files that are not an export", output_dir=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    refused("vLLM takes A and B of linear layers alone", LoRAConfig(r=2, use_dora=True), serving="vllm")


def test_an_export_at_the_end_finds_its_probe_and_leaves_what_was_trained_last(tmp_path, make_module):
    module, ended = make_module(Vision(), LoRAConfig(r=2, modules_to_save=["head"])), {}

    class Remember(Callback):
        def on_train_end(self, trainer, pl_module):
            ended.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    export = ExportAtEnd("merged, adapter", "out", dtype="bfloat16")
    callbacks = [FreezeBase(show_table=False), Remember(), export]
    trainer_of(tmp_path, logger=True, callbacks=callbacks, max_epochs=2).fit(module, loader(), {"a": stream()})
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["dtype"] == "bfloat16"
    assert {"adapter", "merged"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert all(torch.equal(ended[k], v) for k, v in module.state_dict().items())


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


def probe_of(make_module, data):
    data.setup("fit")
    return first_batch(loaders_of(data), make_module(Vision(), LoRAConfig(r=2)))


@pytest.mark.parametrize("case", FOUND)
def test_the_first_batch_that_any_loader_gives_is_the_probe(case, make_module):
    train, val = FOUND[case]
    batch = probe_of(make_module, Data(train, **val))
    assert torch.equal(batch["x"], X)
    assert torch.equal(batch["labels"], torch.tensor([0, 1]))


def test_no_batch_at_all_leaves_the_probe_to_the_model(make_module):
    assert probe_of(make_module, Data(empty(), val=empty())) is None
    assert probe_of(make_module, LightningDataModule()) is None
