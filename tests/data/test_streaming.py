"""A stream gives the rows of the table, for ever; processes share it; a run that was cut short goes on as if not."""

import functools
import pickle
import subprocess
from collections import Counter
from itertools import islice, pairwise
from types import SimpleNamespace

import datasets
import pytest
import torch

from lora_lightning import FreezeBase, LoRAConfig, LoRAError, LoRAModule, Resume
from lora_lightning.data.language_modelling import Endless, LanguageModellingData, endless, share_of
from lora_lightning.tasks.language_model import CausalLM
from lora_lightning.training.optim import WarmupDecay
from lora_lightning.training.tracking.loggers import ContinuedCSVLogger
from lora_lightning.training.trainer import LoRATrainer
from tests.data import files
from tests.data.files import ALL
from tests.tiny_lm import make_model, make_texts
from tests.training.resuming import EveryState, differing, ended

TEXTS = make_texts(60, longest=30)
AdamW = functools.partial(torch.optim.AdamW, lr=0.01)


def process(rank, of=2):
    """As much of a trainer as a stream asks for its share."""
    return SimpleNamespace(strategy=None, world_size=of, global_rank=rank)


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


def test_processes_take_turns_over_the_ends_of_a_stream_in_one_file(path, tokenizer):
    """As N processes equal one: an odd number of rows moves nobody's turn."""
    stream = data_of(path, tokenizer, packing=False).streams["train"]
    one, two = (list(islice(endless(stream, process(rank)), 150)) for rank in range(2))
    assert [row for pair in zip(one, two, strict=True) for row in pair] == list(islice(Endless(stream), 300))


@pytest.mark.parametrize("count", [1, 2])
def test_processes_share_the_rows_of_one_file_and_of_several(tmp_path, tokenizer, count):
    files = [write(tmp_path / f"{i}.jsonl", TEXTS[i::count]) for i in range(count)]
    stream = datasets.load_dataset("json", streaming=True, data_files=files)["train"]
    stream = stream.map(lambda row, i: row | {"__row__": i}, with_indices=True)
    encoded = data_of(files[0], tokenizer, packing=False).encode_stream(stream, ["text"], "train")
    one, two = (pieces(share_of(encoded, process(rank))) for rank in range(2))
    assert one + two == pieces(encoded)
    assert one
    assert two


def fit(path, tokenizer, folder, ckpt=None, workers=0, **options):
    """Five steps with dropout and a schedule that asks for the fit's length before the checkpoint is read."""
    torch.manual_seed(1)
    lora = LoRAConfig(r=4, dropout=0.2)
    module = LoRAModule(make_model("llama"), CausalLM(), lora, AdamW, lr_scheduler=WarmupDecay)
    given = {"max_steps": 5, "max_epochs": 1, "val_check_interval": 2, "num_sanity_val_steps": 0, **options}
    trainer = LoRATrainer(
        accelerator="cpu", callbacks=[FreezeBase(False), Resume(), EveryState(save_every=1)],
        enable_progress_bar=False, enable_model_summary=False,
        logger=ContinuedCSVLogger(folder, name="run", version=0), **given,
    )  # fmt: skip
    trainer.fit(module, data_of(str(path), tokenizer, num_workers=workers), ckpt_path=ckpt)
    return trainer


@pytest.fixture
def both(tmp_path):
    (tmp_path / "both").mkdir()
    for split, texts in (("train", TEXTS), ("validation", TEXTS[:9])):
        write(tmp_path / "both" / f"{split}.jsonl", texts)
    return tmp_path / "both"


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_fit_is_the_uninterrupted_one(both, tmp_path, tokenizer, workers):
    """A validation's worker draws no number of training's."""
    whole = ended(fit(both, tokenizer, tmp_path / "whole", workers=workers))
    middle = tmp_path / "whole" / "run" / "version_0" / "checkpoints" / "003-batch.ckpt"
    assert differing(whole, ended(fit(both, tokenizer, tmp_path / "rest", str(middle), workers=workers))) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_with_the_rows_that_come_next(path, both, tokenizer, tmp_path, workers):
    """Also of two workers, of which one has no file of its own; a SIGTERM to the whole process group ends neither."""

    def rows(data, count):
        batches = iter(data.train_dataloader())
        first = next(batches)["input_ids"].tolist()
        for worker in torch.multiprocessing.active_children():
            subprocess.run(["kill", str(worker.pid)], check=True)
        return [first, *(batch["input_ids"].tolist() for batch in islice(batches, count - 1))]

    loop = fit(both, tokenizer, tmp_path, accumulate_grad_batches=2).fit_loop
    assert loop.epoch_loop.batch_progress.total.ready == 10
    again = data_of(path, tokenizer, num_workers=workers)
    again.trainer = SimpleNamespace(max_steps=9, limit_val_batches=0, fit_loop=loop, **vars(process(0, of=1)))
    assert rows(again, 20) == rows(data_of(path, tokenizer, num_workers=workers), 30)[10:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": -1}, r"set trainer.max_steps to the number of optimizer steps"),
        ({"val_check_interval": 1.0}, r"set trainer.val_check_interval to a number of batches, or trainer.limit_val_b"),
    ],
)
def test_what_waits_for_the_end_of_a_stream_is_refused(both, tmp_path, tokenizer, options, said):
    with pytest.raises(LoRAError, match=said):
        fit(both, tokenizer, tmp_path / "run", **options)


@pytest.mark.parametrize("packing", [True, False])
def test_a_loader_of_a_stream_goes_to_workers_that_are_not_forked(path, tokenizer, packing):
    """They get it pickled: on macOS and Windows, and since Python 3.14 on Linux."""
    loader = data_of(path, tokenizer, packing=packing).train_dataloader()
    stream, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    here, there = (list(islice(rows, 9)) for rows in (loader.dataset, stream))
    assert here == there
    assert collate(there[:2]).keys() == loader.collate_fn(here[:2]).keys()
