"""Where in a fit a checkpoint is written, and the loops' state at one of two places from which a fit resumes exactly.

All private names of Lightning's loops are in this file: nothing public says where a fit is within a step, or lets a
loop forget that it was loaded. `tests/training/test_loop_state.py` pins them.

A checkpoint may be written in many hooks, and Lightning's loops resume from some of them with a step, a validation or
an epoch more or less. So their state is saved as of one of two places:

- `batch`: in the middle of an epoch, after an optimizer step and its validation;
- `epoch`: between two epochs.

The counts are those of `trainer.fit_loop.state_dict()`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from lora_lightning.data.loading.sampler import ResumableLoader

COUNTS = ("ready", "started", "processed", "completed")


@dataclass(frozen=True)
class Place:
    """A fit's progress."""

    kind: str
    """`batch` or `epoch`."""
    epochs: int
    """Finished epochs."""
    at_step: bool
    """Whether no micro-batch of the optimizer step is missing."""
    validates_next: bool
    """Whether a validation is due that a resumed fit would leave out."""
    in_epoch_loop: bool
    """Whether Lightning has yet to count this step."""


def place_of(trainer: Trainer) -> Place:
    """The place of the running fit."""
    loop, fetcher = trainer.fit_loop, _fetcher(trainer)
    epochs: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress
    whole = batches.is_last_batch or batches.current.ready >= trainer.num_training_batches
    inside = epochs.ready == epochs.started and epochs.processed == epochs.started - 1
    validates = inside and fetcher is not None and trainer.enable_validation and not trainer.validating
    return Place(
        kind="epoch" if whole else "batch",
        epochs=epochs.started if whole else epochs.started - 1,
        at_step=not is_between_steps(trainer),
        validates_next=validates and loop.epoch_loop._should_check_val_fx(fetcher),
        in_epoch_loop=inside,
    )


def canonical_state(fit_loop: dict[str, Any], place: Place) -> dict[str, Any]:
    """The loops' state at one of the two places."""
    state = copy.deepcopy(fit_loop)
    batches, epochs = state["epoch_loop.batch_progress"], state["epoch_progress"]
    epoch_loop = state["epoch_loop.state_dict"]
    stepped = epoch_loop["_batches_that_stepped"] + (place.in_epoch_loop and place.at_step)
    offset = epochs["total"]["started"] - epochs["current"]["started"]  # of earlier fits with this trainer
    for scope, earlier in (("total", offset), ("current", 0)):
        finished = place.epochs + earlier
        if place.kind == "epoch":
            _count(epochs[scope], finished)
            _count(batches[scope], batches[scope]["ready"])
        else:
            _count(epochs[scope], finished, begun=finished + 1)
            # Lightning takes this for a checkpoint at a batch's end, and counts the batch as completed.
            _count(batches[scope], batches[scope]["ready"] - 1, begun=batches[scope]["ready"])
            batches[scope]["processed"] = batches[scope]["ready"]
    batches["is_last_batch"] = False
    # Lightning adds the step of a batch's end when it resumes there, and nothing between epochs.
    epoch_loop["_batches_that_stepped"] = stepped - (place.kind == "batch" and place.at_step)
    return state


def _count(counts: dict[str, int], done: int, begun: int | None = None) -> None:
    begun = done if begun is None else begun
    counts.update(zip(COUNTS, (begun, begun, done, done), strict=True))


def begin_epoch_anew(trainer: Trainer) -> None:
    """Let a fit that resumes between two epochs go on like an uninterrupted one; for `on_train_epoch_start`.

    The loader's iteration begins again: Lightning began it before the sampler had the epoch.
    """
    trainer.fit_loop.epoch_loop.restarting = False
    if (fetcher := _fetcher(trainer)) is not None:
        iter(fetcher)


def restarting_loaders(trainer: Trainer) -> list[str]:
    """Class names of the loaders that cannot resume in an epoch's middle."""
    combined, names = trainer.fit_loop._combined_loader, []
    for loader in [] if combined is None else combined.flattened:
        keeps_place = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        if not (loader.keeps_place if isinstance(loader, ResumableLoader) else keeps_place):
            names.append(type(loader).__name__)
    return names


def restore_loader_places(trainer: Trainer) -> None:
    """Restore the places of loaders that were made before the checkpoint was read.

    They are where a schedule has read the number of steps; Lightning restores them too late then.
    """
    loop, fetcher = trainer.fit_loop, _fetcher(trainer)
    if loop._combined_loader_states_to_load and fetcher is not None:
        loop._load_combined_loader_states()
        iter(fetcher)


def is_between_steps(trainer: Trainer) -> bool:
    """Whether the last micro-batch's optimizer step waits for further ones."""
    return bool(trainer.fit_loop._should_accumulate())


def logged_steps(trainer: Trainer) -> int:
    """Finished optimizer steps: the number under which the next one is logged."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_logged(trainer: Trainer) -> bool:
    """Whether the running optimizer step gets a row in the log."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (logged_steps(trainer) + 1) % every == 0


def forget_restart(trainer: Trainer) -> None:
    """Let the fit loop forget that it was loaded."""
    trainer.fit_loop._restarting = False  # the public setter sets True where there are max_steps


def _fetcher(trainer: Trainer) -> Any:
    """Lightning's data fetcher; None before the loaders are made."""
    return trainer.fit_loop._data_fetcher
