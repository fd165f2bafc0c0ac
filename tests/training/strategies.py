"""Every strategy beside one process. Run in several as `python -m tests.training.strategies WHAT FOLDER PROCESSES`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, default_collate

from lora_lightning import (
    CausalLM,
    ExportAtEnd,
    FreezeBase,
    LoRAConfig,
    LoRAError,
    LoRAModule,
    Resume,
    RunReport,
    StopOnNonFinite,
)
from lora_lightning.data.language_modelling import LanguageModellingData
from lora_lightning.data.loading.sampler import EpochSampler, ResumableLoader
from lora_lightning.tasks.contrastive import ContrastiveEmbedding
from lora_lightning.training import trainer as lightning_trainer
from lora_lightning.training.callbacks.monitors import RankTelemetry
from lora_lightning.training.strategies.base import local_shard
from lora_lightning.training.strategies.collectives import gather
from lora_lightning.training.strategies.fsdp2 import FSDP2Strategy
from tests.processes import REPOSITORY, in_processes
from tests.tiny_lm import make_model, make_texts, make_tokenizer
from tests.training.ragged import Ragged, adamw, module, rows
from tests.training.ragged import fit as measured
from tests.training.resuming import EveryState, at, ended, trainer_of

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": functools.partial(DDPStrategy, broadcast_buffers=False, find_unused_parameters=True),
    "fsdp2": FSDP2Strategy,
}
ONE = "one process"


def script(what: str, folder: Path, processes: int, name: str = "strategies") -> None:
    """In a process of its own: the first backward must not come before the fork."""
    command = [sys.executable, "-m", f"tests.training.{name}", what, str(folder), str(processes)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


# Law 9: what one process does with the whole batch of a step.


@dataclass(frozen=True)
class Case:
    """`data(parts)` is a batch's share where a step's rows lie in so many parts, over processes and micro-batches."""

    module: Callable[[], LoRAModule] = module
    data: Callable[[int], Any] = lambda parts: Ragged(4 // parts)
    accumulate: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    closeness: float = 1e-9
    slow: bool = False
    strategies: tuple[str, ...] = ("ddp", "fsdp2")
    processes: tuple[int, ...] = (2, 4)


def fit_case(name: str, processes: int = 1, **options: Any) -> dict[str, Any]:
    case = CASES[name]
    over = case.accumulate if processes > 1 else 1
    given = {"accumulate_grad_batches": over, "devices": processes, **case.options, **options}
    return measured(case.data(processes * over), made=case.module(), **given)


def language_model(heads: list[str] | None = None) -> LoRAModule:
    """Whose loss is taken from its head, or a trained copy of it, beside the model's own call."""
    lora = LoRAConfig(r=3, modules_to_save=heads)
    return LoRAModule(make_model("llama", dtype=torch.float64), CausalLM(), lora, optimizer=adamw)


class Sentences(Ragged):
    """Of unlike length, each with something to train on."""

    def loader(self, data: Any) -> Any:
        made = [{"input_ids": row["ids"], "labels": row["labels"].clone()} for row in data]
        for row in made:
            row["labels"][1:3] = row["input_ids"][1:3]
        return super().loader(made)


def encoder(**task: Any) -> LoRAModule:
    torch.manual_seed(0)
    options = {"temperature": 0.2, "symmetric": True} | task
    lora = LoRAConfig(r=3, alpha=6, target_modules=["0", "2"])
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    return LoRAModule(net, ContrastiveEmbedding(**options), lora, optimizer=adamw)


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Anchors, positives near them, hard negatives less near; some positives are of one group."""
    g = torch.Generator().manual_seed(seed)
    anchors = torch.randn(count, 8, generator=g, dtype=torch.float64)
    near, far = (anchors + share * torch.randn(count, 8, generator=g).double() for share in (0.5, 1.0))
    groups = [torch.tensor([i % 4 + 4 * (i % 5), -1]) for i in range(count)]
    parts = zip(anchors, near, far, groups, strict=True)
    named = ("anchor", "positive", "negative")
    return [{name: {"input": x} for name, x in zip(named, row, strict=True)} | {"labels": y} for *row, y in parts]


class Pairs(LightningDataModule):
    """Twelve steps of 5 pairs, which two processes have 2 and 3 of; 13 are validated on, 4 at a time."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.ends = {1: (0, 5), 2: (0, 2, 5)}[parts]

    def train_dataloader(self) -> Any:
        first, last = self.ends[self.trainer.global_rank :][:2]
        batches = [[5 * k + i for i in range(first, last)] for k in range(12)]
        return DataLoader(pairs(60, seed=1), batch_sampler=batches, collate_fn=default_collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        mine = pairs(13, seed=2)[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=4)  # type: ignore[arg-type]


def texts(parts: int, **options: Any) -> LanguageModellingData:
    """Texts of unlike length, of which neither batches nor processes get the same numbers."""
    folder = Path("texts").absolute()
    if not folder.is_dir():
        make_tokenizer().save_pretrained(folder)
        for split, count in (("train", 97), ("validation", 11)):
            made = make_texts(count, longest=20, seed=count)
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in made))
    return LanguageModellingData(str(folder), str(folder), max_length=24, batch_size=8 // parts, **options)


TEXTS = {"max_steps": 12, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 6}
TEXTS |= {"precision": "64-true", "gradient_clip_val": None}
NARROW = {"precision": "bf16-base", "max_steps": 6}
FEW = {"max_steps": 20}
IN_TWO: dict[str, Any] = {"slow": True, "strategies": ("ddp",), "processes": (2,)}
APART = {"max_epochs": 2, "use_distributed_sampler": False}
SGD = functools.partial(torch.optim.SGD, lr=0.5)  # Adam would blow bfloat16's rounding up to whole steps
streamed = functools.partial(texts, streaming=True, shuffle_buffer=20)
CASES = {
    "ragged": Case(),
    "three batches a step": Case(data=lambda parts: Ragged(12 // parts), accumulate=3),
    "four batches a step": Case(data=lambda parts: Ragged(16 // parts), accumulate=4, slow=True),
    "a trained head": Case(lambda: language_model(["lm_head"]), lambda parts: Sentences(4 // parts), options=FEW),
    "a plain head": Case(language_model, lambda parts: Sentences(4 // parts), options=FEW),
    "pairs": Case(encoder, Pairs, options=APART, processes=(2,)),
    "pairs that each process has to itself": Case(lambda: encoder(gather=False), Pairs, options=APART, processes=(2,)),
    "packed texts": Case(language_model, texts, options=TEXTS, **IN_TWO),
    "texts": Case(language_model, functools.partial(texts, packing=False), options=TEXTS, **IN_TWO),
    "streamed texts": Case(language_model, streamed, options=TEXTS, **IN_TWO),
    "a bfloat16 base": Case(
        lambda: module(torch.float32, SGD, modules_to_save=["norm"]), options=NARROW, closeness=0.02, **IN_TWO
    ),
}


def cases(processes: int, slow: bool = True) -> list[tuple[str, str]]:
    """The strategies and cases that go with so many processes, all or the quick ones."""
    given = [(name, case) for name, case in CASES.items() if processes in case.processes and (slow or not case.slow)]
    return [(strategy, name) for strategy in STRATEGIES for name, case in given if strategy in case.strategies]


def equality(folder: Path, processes: int, slow: bool = True) -> None:
    """Fit each of them."""
    for strategy, name in cases(processes, slow):
        fit_case(name, processes, strategy=STRATEGIES[strategy](), file=folder / f"{strategy} {name}.pt")


# A run's life.


class Shuffled(Ragged):
    """In a new order each epoch; the four rows of a step are the same however many processes share them."""

    def __init__(self) -> None:
        super().__init__(4)

    def train_dataloader(self) -> Any:
        size, data = self.batch_size // self.trainer.world_size, rows(26, seed=1)
        places = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank, "shuffle": True, "seed": 5}
        return ResumableLoader(data, batch_size=size, sampler=EpochSampler(data, batch_size=size, **places))

    def test_dataloader(self) -> Any:
        return self.loader(rows(13, seed=3))

    def predict_dataloader(self) -> Any:
        return self.loader(rows(13, seed=3))


def dropping() -> LoRAModule:
    return module(torch.float32, dropout=0.2, modules_to_save=["norm"])


def steady() -> LoRAModule:
    """By SGD: AdamW would make steps of the size of lr out of gradients that are rounding."""
    return module(optimizer=functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9), modules_to_save=["norm"])


def fit(
    folder: Path,
    *callbacks: Callback,
    ckpt: Path | None = None,
    made: Callable[[], LoRAModule] = dropping,
    data: Any = None,
    **options: Any,
) -> Trainer:
    """Three epochs of seven steps, with dropout and shuffling, saved after every step."""
    seed_everything(11, verbose=False)
    if ckpt is not None:
        torch.rand(7)  # another number of draws in front of a resumed fit
    guards = [FreezeBase(show_table=False), Resume(), StopOnNonFinite(), EveryState(save_every=1)]
    given = {"gradient_clip_val": 1.0, "num_sanity_val_steps": 1} | options
    trainer = trainer_of(*callbacks, *guards, folder=folder, **given)
    trainer.fit(made(), data or Shuffled(), ckpt_path=None if ckpt is None else str(ckpt))
    return trainer


def begin(folder: Path, name: str, **options: Any) -> None:
    """An epoch of a fit that ends under another strategy."""
    fit(folder / name, made=steady, max_epochs=1, **options)


def end(folder: Path, source: str, target: str, **options: Any) -> None:
    """The next epoch, from the other's checkpoint."""
    fit(folder / f"{source} to {target}", made=steady, ckpt=at(folder / source, 7), max_epochs=2, **options)


class Nudge(Callback):
    """Writes into one process's part of W0, or puts what is not finite into its loss, after the fourth step."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.what == "w0" and trainer.global_step == 4 and trainer.global_rank == 1:
            local_shard(pl_module.backbone.layers[1].up.weight).view(-1)[0] += 1e-3

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if self.what == "loss" and trainer.global_step == 4 and trainer.global_rank == 1:
            loss.data.fill_(float("nan"))


def raised(call: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What each process raised."""
    try:
        call(*args, **options)
    except LoRAError as error:
        return gather(f"{type(error).__name__}: {error}")
    return gather("nothing")


def life(folder: Path, processes: int) -> None:
    """All that happens to a run; process 0 writes down what was found."""
    equality(folder, processes, slow=False)
    with pytest.MonkeyPatch.context() as patch:
        # It ends the processes that fail together, and these are to tell what each of them met.
        patch.setattr(lightning_trainer, "end_together", lambda *_, **__: nullcontext())
        for strategy, new in STRATEGIES.items():
            live(folder / strategy, new, processes)
    for strategy, new in STRATEGIES.items():
        begin(folder, strategy, strategy=new(), devices=processes)
    for target, new in STRATEGIES.items():
        for source in (ONE, *STRATEGIES):
            end(folder, source, target, strategy=new(), devices=processes)


def live(folder: Path, new: Callable[[], Any], processes: int) -> None:
    found: dict[str, Any] = {"gathered": []}

    def again(name: str, *callbacks: Callback, **options: Any) -> Trainer:
        return fit(folder / name, *callbacks, strategy=new(), devices=processes, **options)

    gather_whole = DTensor.full_tensor

    def noted(tensor: DTensor, **options: Any) -> Any:
        found["gathered"].append(tuple(tensor.shape))
        return gather_whole(tensor, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", noted)
        first = again("file")
        found["whole"] = ended(first)
        found["figures"] = figures(first, at(folder / "file", 9))
        for step in (9, 14):  # in an epoch's middle and at an end
            found[f"from {step}"] = ended(again(f"from {step}", ckpt=at(folder / "file", step)))
    watching = [RankTelemetry(every_n_steps=1), ExportAtEnd(), RunReport()]
    # A trained bias's copies must not be taken for the base's own.
    biased = functools.partial(module, torch.float32, bias="lora_only")
    again("bf16", *watching, made=biased, precision="bf16-mixed", max_steps=2)
    for what in ("w0", "loss"):
        found[f"stopped by {what}"] = raised(again, what, Nudge(what))
    found["misfits"] = misfits(folder, at(folder / "file", 9), new, processes)
    if first.is_global_zero:
        torch.save(found, folder / "found.pt")


def figures(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Metrics of a test and a validation from a checkpoint, and the predictions of all processes, by row."""
    given: Any = {"datamodule": Shuffled(), "ckpt_path": str(checkpoint)}
    tested = trainer.test(trainer.lightning_module, verbose=False, **given)[0]
    validated = trainer.validate(trainer.lightning_module, verbose=False, **given)[0]
    predicted = trainer.predict(trainer.lightning_module, **given)
    mine = [torch.cat([batch["logits"] for batch in predicted])]  # type: ignore[union-attr,index]
    parts = [part[0] for part in gather(mine)]
    by_row = torch.empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        by_row[rank :: len(parts)] = part
    return {**tested, **validated, "predicted": by_row}


def misfits(folder: Path, file: Path, new: Callable[[], Any], processes: int) -> dict[str, list[str]]:
    """What is said of checkpoints of another base, and of keys and shapes that do not fit."""
    changes: dict[str, Any] = {"another base": {}, "shapes": {"r": 2}, "keys": {"target_modules": ["up"]}}
    said = {}
    for name, change in changes.items():
        made = module(torch.float32, dropout=0.2, modules_to_save=["norm"], **change)
        made.lora = dropping().lora  # says what the checkpoint says, also where it is not so
        if name == "another base":
            made.backbone.layers[2].down.bias.data[0] += 1  # type: ignore[index,union-attr]
        trainer = trainer_of(folder=folder / "misfit", strategy=new(), devices=processes)
        said[name] = raised(trainer.test, made, Shuffled(), ckpt_path=str(file), verbose=False)
    return said


if __name__ == "__main__":
    what, where, number = sys.argv[1:]
    os.chdir(where)  # for the texts, which one process has written
    limit = float(os.environ.get("LIMIT", "600"))
    sys.exit(max(map(abs, in_processes(int(number), globals()[what], Path(where), int(number), timeout=limit))))
