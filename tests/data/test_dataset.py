"""Datasets by class, streams in shares, and sets of the hub's form as torch datasets."""

import itertools
import operator

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lora_lightning import LoRAError
from lora_lightning.data.dataset import DatasetData, Share, hub_dataset
from lora_lightning.data.io.tables import read_tables
from tests.data.files import write


class Count(IterableDataset):
    def __init__(self, n):
        super().__init__()
        self.n = n

    def __iter__(self):
        return iter(range(self.n))


def numbers(loader):
    return sorted(int(i) for batch in loader for i in batch)


def test_a_dataset_with_a_length_is_shuffled_in_training_alone_and_a_stream_is_not():
    data = TensorDataset(torch.arange(20), torch.zeros(20))
    module = DatasetData(train=data, test=data, batch_size=6, eval_batch_size=7)
    train = [batch[0] for batch in module.train_dataloader()]
    assert [len(batch) for batch in train] == [6, 6, 6, 2]
    assert numbers(train) == list(range(20)) != torch.cat(train).tolist()
    for loader in (module.test_dataloader(), module.predict_dataloader()):
        assert next(iter(loader))[0].tolist() == list(range(7))
    assert module.val_dataloader() == []
    assert not module.has_validation
    assert len(list(DatasetData(train=data, batch_size=6, drop_last=True).train_dataloader())) == 3
    stream = DatasetData(train=Count(5), validation=Count(3), batch_size=2)
    assert [batch.tolist() for batch in stream.train_dataloader()] == [[0, 1], [2, 3], [4]]
    assert [batch.tolist() for batch in stream.val_dataloader()] == [[0, 1], [2]]


@pytest.fixture
def saved(tmp_path):
    table = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(12)], "y": list(range(12))})
    datasets.DatasetDict(train=table, test=table.select(range(4))).save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "files/train.parquet")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["saved", "files"])
def test_a_set_from_disk_keeps_the_columns_that_are_named(saved, form, streaming):
    data = hub_dataset(str(saved / form), columns={"y": "labels"}, streaming=streaming)
    assert isinstance(data, IterableDataset if streaming else Dataset)
    rows = list(data) if streaming else [data[i] for i in range(len(data))]
    assert [int(row["labels"]) for row in rows] == list(range(12))
    assert set(rows[0]) == {"labels"}
    assert isinstance(rows[0]["labels"], torch.Tensor)
    (y, text), *_ = hub_dataset(str(saved / "saved"), split="test", transform=lambda row: (row["y"], row["text"]))
    assert (int(y), text) == (0, "t0")
    loader = DatasetData(train=data, batch_size=5, shuffle=False).train_dataloader()
    assert [len(batch["labels"]) for batch in loader] == [5, 5, 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_processes_and_workers_share_a_stream(saved, world, workers):
    hub = hub_dataset(str(saved / "files"), columns={"y": "y"}, streaming=True, transform=operator.itemgetter("y"))
    for stream, n in ((Count(23), 23), (hub, 12)):
        shares = [numbers(DataLoader(Share(stream, world, rank), num_workers=workers)) for rank in range(world)]
        assert sorted(itertools.chain(*shares)) == list(range(n)), "each example once"
    even = [numbers(DataLoader(Share(Count(23), world, r, even=True), num_workers=workers)) for r in range(world)]
    assert len({len(share) for share in even}) == 1, "in training nobody waits for another"
    assert set(itertools.chain(*even)) <= set(range(23))
    assert sum(map(len, even)) > 23 - world * max(workers, 1)


def test_a_stream_is_shuffled_anew_by_epoch(saved):
    stream = hub_dataset(str(saved / "files"), streaming=True, shuffle_buffer=12, transform=lambda row: int(row["y"]))
    share = Share(stream)
    orders = []
    for epoch in (0, 1, 0):
        share.set_epoch(epoch)
        orders.append(list(share))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(12))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda p: DatasetData().train_dataloader(), "there is no train set: give data.init_args.train a class_path"),
        (lambda p: DatasetData(train=TensorDataset(torch.zeros(0))).train_dataloader(), "the train set is empty"),
        (lambda p: DatasetData(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda p: hub_dataset(str(p / "nothing")), "no set '.*nothing' with a split 'train'"),
        (lambda p: hub_dataset(str(p / "saved"), split="tests"), "has no split 'tests'; did you mean 'test'"),
        (lambda p: hub_dataset(str(p / "files"), columns={"txt": "t"}), "no column 'txt'; did you mean 'text'"),
    ],
)
def test_a_misfit_is_named(act, said, saved):
    with pytest.raises(LoRAError, match=said):
        act(saved)


def test_a_part_of_a_hub_set_stands_for_a_file(tmp_path, monkeypatch):
    """`datasets` takes a directory for a set of the hub."""
    datasets.Dataset.from_dict({"a": [1, 2, 3, 4]}).to_json(tmp_path / "train.jsonl")
    found = read_tables({"train": f"{tmp_path}@train[:3]", "validation": f"{tmp_path}@train[3:]"})
    assert {split: table["a"][:] for split, table in found.items()} == {"train": [1, 2, 3], "validation": [4]}
    with pytest.raises(LoRAError, match="no part 'tset' of a set"):
        read_tables({"train": f"{tmp_path}@tset"})


def test_a_file_is_read_by_its_name_alone_and_two_of_one_split_are_refused(tmp_path):
    for name in ("data1.csv", "data[1].csv", "train.csv", "dev.csv", "val.csv"):
        write(tmp_path / name, [{"a": name}])
    assert read_tables(str(tmp_path / "data[1].csv"))["train"]["a"][:] == ["data[1].csv"]
    for path in (str(tmp_path), dict.fromkeys(("dev", "val"), str(tmp_path / "dev.csv"))):
        with pytest.raises(LoRAError, match=r"dev\S* and val\S* are both the validation set"):
            read_tables(path)
