"""Fits under FSDP2. Run in several processes as `python -m tests.training.sharded WHAT FOLDER PROCESSES`."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from lora_lightning import (
    CausalLM,
    Checkpoints,
    ExportAtEnd,
    FreezeBase,
    LoRAConfig,
    LoRAError,
    LoRAModule,
    Resume,
    RunReport,
    StopOnNonFinite,
)
from lora_lightning.data.loading.loader import ResumableLoader
from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.training import trainer as lightning_trainer
from lora_lightning.training.strategies.base import local_shard
from lora_lightning.training.strategies.collectives import gather
from lora_lightning.training.strategies.fsdp2.strategy import FSDP2Strategy
from lora_lightning.training.tracking.csv_logger import ContinuedCSVLogger
from lora_lightning.training.trainer import LoRATrainer
from tests.processes import in_processes
from tests.training import ragged
from tests.training.ragged import VOCABULARY, Tokens


class Block(nn.Module):
    """A norm and two linear layers around it, odd in size: no number of processes divides its rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 13), nn.Linear(13, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


class Told(Tokens):
    """That also says what it predicts."""

    def predict(self, backbone: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"logits": backbone(batch["ids"])}


class Net(nn.Module):
    """Token by token; the head is tied to the embedding."""

    def __init__(self, width: int = 17, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x)) * self.scale
        return logits


def module(dtype: torch.dtype = torch.float64, **config: Any) -> LoRAModule:
    torch.manual_seed(0)
    lora = LoRAConfig(**{"r": 3, "alpha": 6, "target_modules": ["up", "down"]} | config)
    return LoRAModule(Net().to(dtype), Told(), lora, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))


def equality(folder: Path, processes: int, new: Callable[[], Strategy] = FSDP2Strategy) -> None:
    """The fits of `ragged`, sharded."""
    for accumulate in (1, 3):
        many = {"strategy": new(), "devices": processes, "accumulate_grad_batches": accumulate}
        ragged.fit(2, file=folder / f"{accumulate}.pt", made=module(), **many)
    for name, (heads, steps) in LANGUAGE_MODELS.items():
        many = {"strategy": new(), "devices": processes, "max_steps": steps}
        ragged.fit(0, file=folder / f"{name}.pt", data=Sentences(2), made=language_model(heads), **many)


LANGUAGE_MODELS: dict[str, tuple[tuple[str, ...], int]] = {"lm": (("lm_head",), 20), "lm with a plain head": ((), 12)}
"""What trains of the head, and for how many steps."""


def language_model(heads: tuple[str, ...] = ("lm_head",)) -> LoRAModule:
    """Whose loss is taken from its head, or a trained copy of it, beside the model's own call."""
    torch.manual_seed(0)
    sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": ragged.LENGTH}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False)).double()  # Llama's norms are in float32
    lora = LoRAConfig(r=3, modules_to_save=list(heads) or None)
    return LoRAModule(gpt2, CausalLM(), lora, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))


class Sentences(ragged.Ragged):
    """Of unlike length, each with something to train on."""

    def loader(self, data: Any) -> Any:
        rows = [{"input_ids": row["ids"], "labels": row["labels"].clone()} for row in data]
        for row in rows:
            row["labels"][1:3] = row["input_ids"][1:3]
        return super().loader(rows)


class Shuffled(ragged.Ragged):
    """In a new order each epoch; the four rows of a step are the same however many processes share them."""

    def __init__(self, at_once: int = 4) -> None:
        super().__init__(at_once)

    def train_dataloader(self) -> Any:
        size, data = self.batch_size // self.trainer.world_size, ragged.rows(26, seed=1)
        places = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank, "shuffle": True, "seed": 5}
        return ResumableLoader(data, batch_size=size, sampler=EpochSampler(data, batch_size=size, **places))

    def test_dataloader(self) -> Any:
        return self.loader(ragged.rows(13, seed=3))

    def predict_dataloader(self) -> Any:
        return self.loader(ragged.rows(13, seed=3))


class Keep(Checkpoints):
    """Keeps a copy of each `last.ckpt`, by its step."""

    def _save_newest(self, trainer: Trainer) -> None:
        before = self._newest
        super()._save_newest(trainer)
        if self._newest != before and trainer.is_global_zero:
            last = Path(self.last_model_path)
            copy = last.with_name(f"{self._newest[0]:03}.ckpt")
            shutil.copyfile(last, copy)
        trainer.strategy.barrier()


def fit(
    folder: Path,
    *callbacks: Any,
    ckpt: Path | None = None,
    made: Callable[[], LoRAModule] | None = None,
    **options: Any,
) -> Trainer:
    """Three epochs of seven steps, with dropout and shuffling, saved after every step."""
    seed_everything(11, verbose=False)
    if ckpt is not None:
        torch.rand(7)  # another number of draws in front of a resumed fit
    trained = module(torch.float32, dropout=0.2, modules_to_save=["norm"]) if made is None else made()
    trainer = trainer_of(
        FreezeBase(show_table=False), Resume(), StopOnNonFinite(), *callbacks, folder=folder, **options
    )
    trainer.fit(trained, Shuffled(), ckpt_path=None if ckpt is None else str(ckpt))
    return trainer


def trainer_of(*callbacks: Any, folder: Path, **options: Any) -> LoRATrainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    logger = ContinuedCSVLogger(folder, name="run", version=0)
    kept = [] if any(isinstance(one, Checkpoints) for one in callbacks) else [Keep(save_every=1)]
    given = {"max_epochs": 3, "gradient_clip_val": 1.0, "num_sanity_val_steps": 1} | options
    return LoRATrainer(callbacks=[*callbacks, *kept], logger=logger, **quiet, **given)


def ended(trainer: Trainer) -> dict[str, Any]:
    """Weights and optimizer at a fit's end, gathered."""
    named = trainer.lightning_module.named_parameters()
    weights = {name: ragged.whole(p).detach().clone() for name, p in named if p.requires_grad}
    states = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{key}": ragged.whole(v).clone() for i, state in states.items() for key, v in state.items()}
    return {**weights, **moments, "step": trainer.global_step}


def at(folder: Path, step: int) -> Path:
    return folder / "run" / "version_0" / "checkpoints" / f"{step:03}.ckpt"


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


def stopped(folder: Path, what: str, strategy: Strategy, processes: int, **options: Any) -> list[str]:
    """What each process raised."""
    try:
        fit(folder, Nudge(what), strategy=strategy, devices=processes, **options)
    except LoRAError as error:
        return gather(f"{type(error).__name__}: {error}")
    return gather("nothing")


def life(folder: Path, processes: int) -> None:
    """All that happens to a run; process 0 writes down what was found."""
    with pytest.MonkeyPatch.context() as patch:
        # It ends the processes that fail together, and these are to tell what each of them met.
        patch.setattr(lightning_trainer, "ending_together", lambda *_, **__: nullcontext())
        _life(folder, processes)


def _life(folder: Path, processes: int) -> None:
    equality(folder, processes)
    found: dict[str, Any] = {"gathered": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", noting(DTensor.full_tensor, found["gathered"]))
        many: dict[str, Any] = {"devices": processes}
        first = fit(folder / "file", strategy=FSDP2Strategy(), **many)
        found["whole"] = ended(first)
        found["figures"] = figures(first, at(folder / "file", 9))
        for step in (9, 14):  # in an epoch's middle and at an end
            again = fit(folder / f"from {step}", ckpt=at(folder / "file", step), strategy=FSDP2Strategy(), **many)
            found[f"from {step}"] = ended(again)
        found["of one process"] = ended(fit(folder / "one", ckpt=folder / "one.ckpt", strategy=FSDP2Strategy(), **many))
    fit(
        folder / "bf16",
        ExportAtEnd(),
        RunReport(),
        made=lambda: module(torch.float32, bias="lora_only"),  # whose copies FSDP2 must not take for the base's own
        strategy=FSDP2Strategy(),
        precision="bf16-mixed",
        max_steps=2,
        **many,
    )
    for what in ("w0", "loss"):
        found[f"stopped by {what}"] = stopped(folder / what, what, FSDP2Strategy(), processes)
    found["misfits"] = misfits(folder, at(folder / "file", 9), processes)
    if first.is_global_zero:
        torch.save(found, folder / "found.pt")


def onward(folder: Path, processes: int) -> None:
    """More processes go on from what two have written."""
    end = fit(folder / "more", ckpt=at(folder / "file", 14), strategy=FSDP2Strategy(), devices=processes)
    found = ended(end)
    if end.is_global_zero:
        torch.save(found, folder / "more.pt")


def noting(call: Any, seen: list[Any]) -> Any:
    @functools.wraps(call)
    def noted(tensor: DTensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(tensor.shape))
        return call(tensor, *args, **kwargs)

    return noted


def figures(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Metrics of a test and a validation from a checkpoint, and the predictions of all processes, by row."""
    given: Any = {"datamodule": Shuffled(), "ckpt_path": str(checkpoint)}
    tested = trainer.test(trainer.lightning_module, verbose=False, **given)[0]
    validated = trainer.validate(trainer.lightning_module, verbose=False, **given)[0]
    predicted = trainer.predict(trainer.lightning_module, **given)
    mine = [torch.cat([batch["logits"] for batch in predicted])]  # type: ignore[union-attr,index]
    parts = [part[0] for part in gather(mine)]
    rows = torch.empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        rows[rank :: len(parts)] = part
    return {**tested, **validated, "predicted": rows}


def misfits(folder: Path, file: Path, processes: int) -> dict[str, list[str]]:
    """What is said of checkpoints of another adapter, of another base, and of keys that do not fit."""
    said = {}

    def of(name: str, made: LoRAModule, checkpoint: Path) -> None:
        trainer = trainer_of(folder=folder / "misfit", strategy=FSDP2Strategy(), devices=processes)
        try:
            trainer.test(made, Shuffled(), ckpt_path=str(checkpoint), verbose=False)
        except LoRAError as error:
            said[name] = gather(str(error))

    config: dict[str, Any] = {"dropout": 0.2, "modules_to_save": ["norm"]}
    of("another rank", module(torch.float32, **config | {"r": 2}), file)
    other = module(torch.float32, **config)
    with torch.no_grad():
        other.backbone.layers[2].down.bias[0] += 1  # type: ignore[index,union-attr]
    of("another base", other, file)
    for what, change in (("shapes", {"r": 2}), ("keys", {"target_modules": ["up"]})):
        made = module(torch.float32, **config | change)
        made.lora = other.lora  # says what the checkpoint says, and is not so
        of(what, made, file)
    return said


if __name__ == "__main__":
    what, where, number = sys.argv[1:]
    limit = float(os.environ.get("LIMIT", "240"))
    sys.exit(max(map(abs, in_processes(int(number), globals()[what], Path(where), int(number), timeout=limit))))
