"""A stream gives the rows of the table, for ever; processes share it; a run that was cut short goes on as if not."""

import functools
import pickle
from collections import Counter
from itertools import islice, pairwise
from types import SimpleNamespace

import datasets
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_lightning import FreezeBase, LoRAConfig, LoRAError, LoRAModule, Resume
from lora_lightning.data.io.streams import Endless, endless, share_of
from lora_lightning.data.language_modelling import LanguageModellingData
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.tasks.language_model import CausalLM
from lora_lightning.training.optim import WarmupDecay
from lora_lightning.training.tracking.csv_logger import ContinuedCSVLogger
from lora_lightning.training.trainer import LoRATrainer
from tests.data import files
from tests.data.files import ALL
from tests.tiny_lm import make_model, make_texts
from tests.training.resuming import EveryState, differing, ended

TEXTS = make_texts(60, longest=30)
AdamW = functools.partial(torch.optim.AdamW, lr=0.01)


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers.lm


def write(path, texts):
    return str(files.write(path, [{"text": text} for text in texts]))


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "set.jsonl", TEXTS)


def data_of(path, tokenizer, **options):
    own = {"max_length": 16, "batch_size": 4, "split": ALL, "shuffle_buffer": 10}
    return LanguageModellingData(path, tokenizer, **{"streaming": True} | own | options)


def pieces(rows):
    """What documents' pieces there are in rows that may be packed."""
    found = Counter()
    for row in rows:
        positions = row.get("position_ids", range(len(row["input_ids"])))
        starts = [i for i, p in enumerate(positions) if p == 0] + [len(positions)]
        found.update(tuple(row["input_ids"][a:b]) for a, b in pairwise(starts))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_has_the_rows_of_the_table(path, tokenizer, packing):
    table = data_of(path, tokenizer, streaming=False, packing=packing)
    table.setup()
    stream = data_of(path, tokenizer, packing=packing).streams["train"]
    assert pieces(stream) == pieces(table.encoded_rows("train"))


def test_a_saved_set_is_streamed_too(tmp_path, tokenizer, path):
    rows = [{"text": text} for text in TEXTS]
    saved = files.save(tmp_path / "saved", train=rows[:50], validation=rows[50:])
    data = data_of(str(saved), tokenizer, packing=False)
    assert data.has_validation
    validated = [batch["input_ids"][batch["attention_mask"].bool()] for batch in data.val_dataloader()]
    assert sum(map(len, validated)) == sum(len(text.split()) + 1 for text in TEXTS[50:])


def test_it_goes_on_in_another_order_each_time_and_the_same_for_one_seed(path, tokenizer):
    one, two, other = (data_of(path, tokenizer, packing=False, seed=seed).streams["train"] for seed in (1, 1, 2))
    count = sum(1 for _ in one)
    endless = [[tuple(row["input_ids"]) for row in islice(Endless(s), 2 * count)] for s in (one, two, other)]
    assert endless[0] == endless[1] != endless[2]
    first, second = endless[0][:count], endless[0][count:]
    assert Counter(first) == Counter(second)
    assert first != second


@pytest.mark.parametrize("count", [1, 2])
def test_processes_share_the_rows(tmp_path, tokenizer, count):
    texts = [TEXTS[i::count] for i in range(count)]
    stream = datasets.load_dataset(
        "json", streaming=True, data_files=[write(tmp_path / f"{i}.jsonl", part) for i, part in enumerate(texts)]
    )["train"]
    data = data_of(str(tmp_path / "0.jsonl"), tokenizer, packing=False)
    encoded = data.encode_stream(stream.map(lambda row, i: row | {"__row__": i}, with_indices=True), ["text"], "train")
    shares = [
        pieces(share_of(encoded, SimpleNamespace(strategy=None, world_size=2, global_rank=rank))) for rank in range(2)
    ]
    assert shares[0] + shares[1] == pieces(encoded)
    assert all(shares)


def test_processes_take_turns_over_the_ends_of_a_stream_in_one_file(path, tokenizer):
    """As N processes equal one: an odd number of rows moves nobody's turn."""
    stream = data_of(path, tokenizer, packing=False).streams["train"]
    nodes = [SimpleNamespace(strategy=None, world_size=2, global_rank=rank) for rank in range(2)]
    one, two = (list(islice(endless(stream, node), 150)) for node in nodes)
    assert [row for pair in zip(one, two, strict=True) for row in pair] == list(islice(Endless(stream), 300))


def fit(path, tokenizer, folder, steps, ckpt_path=None, **options):
    model = make_model("llama", dtype=torch.float64)
    module = LoRAModule(model, CausalLM(), LoRAConfig(r=4), AdamW)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", precision="64-true", accumulate_grad_batches=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, save_last=True)], **options,
    )  # fmt: skip
    torch.manual_seed(1)
    data = data_of(path, tokenizer)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, adapter_tensors(module.backbone)


def rows_seen(data_loader, batches):
    return [batch["input_ids"].tolist() for batch in islice(data_loader, batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_with_the_rows_that_come_next(path, tokenizer, tmp_path, workers):
    """Also of two workers, of which one has no file of its own."""
    whole = rows_seen(data_of(path, tokenizer, num_workers=workers).train_dataloader(), 30)
    trainer, _ = fit(path, tokenizer, tmp_path / "a", 5)
    assert trainer.fit_loop.epoch_loop.batch_progress.total.ready == 10
    again = data_of(path, tokenizer, num_workers=workers)
    again.trainer = SimpleNamespace(
        max_steps=9, limit_val_batches=0, strategy=None, world_size=1, global_rank=0, fit_loop=trainer.fit_loop
    )
    assert rows_seen(again.train_dataloader(), 20) == whole[10:]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_fit_is_the_uninterrupted_one_though_a_schedule_asked_for_its_length_first(
    tmp_path, tokenizer, workers
):
    """Its loader is made before the checkpoint is read; and a validation's worker draws no number of training's."""
    for split, texts in (("train", TEXTS), ("validation", TEXTS[:9])):
        write(tmp_path / f"{split}.jsonl", texts)

    def fit(folder, ckpt=None):
        torch.manual_seed(1)
        lora = LoRAConfig(r=4, dropout=0.2)
        module = LoRAModule(make_model("llama"), CausalLM(), lora, AdamW, lr_scheduler=WarmupDecay)
        trainer = LoRATrainer(
            max_steps=5, max_epochs=1, val_check_interval=2, num_sanity_val_steps=0, accelerator="cpu",
            callbacks=[FreezeBase(False), Resume(), EveryState(save_every=1)], enable_progress_bar=False,
            enable_model_summary=False, logger=ContinuedCSVLogger(folder, name="run", version=0),
        )  # fmt: skip
        trainer.fit(module, data_of(str(tmp_path), tokenizer, num_workers=workers), ckpt_path=ckpt)
        return ended(trainer)

    whole = fit(tmp_path / "whole")
    middle = tmp_path / "whole" / "run" / "version_0" / "checkpoints" / "003-batch.ckpt"
    assert differing(whole, fit(tmp_path / "rest", str(middle))) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": -1, "max_epochs": 1}, r"set trainer.max_steps to the number of optimizer steps"),
        ({"steps": 3}, r"set trainer.val_check_interval to a number of batches, or trainer.limit_val_batches to 0"),
    ],
)
def test_what_waits_for_the_end_of_a_stream_is_refused(tmp_path, tokenizer, options, said):
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "validation.jsonl", TEXTS[:9])
    with pytest.raises(LoRAError, match=said):
        fit(str(tmp_path), tokenizer, tmp_path / "run", **options)


@pytest.mark.parametrize("packing", [True, False])
def test_a_loader_of_a_stream_goes_to_workers_that_are_not_forked(path, tokenizer, packing):
    """They get it pickled: on macOS and Windows, and since Python 3.14 on Linux."""
    loader = data_of(path, tokenizer, packing=packing).train_dataloader()
    stream, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    here, there = (list(islice(rows, 9)) for rows in (loader.dataset, stream))
    assert here == there
    assert collate(there[:2]).keys() == loader.collate_fn(here[:2]).keys()
