"""Where in a fit a checkpoint lies, and Lightning's loops put to one of two places from which they go on exactly.

All private names of Lightning's loops stand in this file: there is no public way to where a fit is within a step, nor
to a loop that is to go on as if it had not been loaded. `tests/training/test_loop_state.py` pins them.

A checkpoint may be written in many hooks, and Lightning's loops resume from some of them with a step, a validation or
an epoch more or less. So their state is written down as one of two:

- `batch`: in the middle of an epoch, after an optimizer step and what was validated behind it;
- `epoch`: between two epochs.

What is counted here is what `trainer.fit_loop.state_dict()` holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lora_lightning.data.loading.loader import ResumableLoader

COUNTS = ("ready", "started", "processed", "completed")


@dataclass(frozen=True)
class Place:
    """Where training is."""

    kind: str
    """`batch` or `epoch`."""
    epochs: int
    """That are over."""
    at_step: bool
    """Not between the micro-batches of one optimizer step."""
    validates_next: bool
    """A validation is due that would not take place in a resumed fit."""
    in_epoch_loop: bool
    """Lightning has not yet counted this step in."""


def place_of(trainer: Trainer) -> Place:
    """Of the fit that runs."""
    loop = trainer.fit_loop
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    whole = batches.is_last_batch or batches.current.ready >= trainer.num_training_batches  # type: ignore[attr-defined]
    inside = epochs.ready == epochs.started and epochs.processed == epochs.started - 1  # type: ignore[attr-defined]
    fetcher = _fetcher(trainer)
    validates = (
        inside and not trainer.validating and fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)
    )
    return Place(
        kind="epoch" if whole else "batch",
        epochs=epochs.started if whole else epochs.started - 1,  # type: ignore[attr-defined]
        at_step=not is_between_steps(trainer),
        validates_next=bool(validates and trainer.enable_validation),
        in_epoch_loop=inside,
    )


def canonical_state(fit_loop: dict[str, Any], place: Place) -> dict[str, Any]:
    """The state of the loops as of one of the two places."""
    state = {key: _copy_state(value) for key, value in fit_loop.items()}
    batches, epochs = state["epoch_loop.batch_progress"], state["epoch_progress"]
    epoch_state = state["epoch_loop.state_dict"]
    stepped = epoch_state["_batches_that_stepped"] + (place.in_epoch_loop and place.at_step)
    offset = epochs["total"]["started"] - epochs["current"]["started"]  # of earlier fits with this trainer
    for which, more in (("total", offset), ("current", 0)):
        over = place.epochs + more
        if place.kind == "epoch":
            _count(epochs[which], over)
            _count(batches[which], batches[which]["ready"])
        else:
            _count(epochs[which], over, begun=over + 1)
            # What Lightning takes for a checkpoint of a batch's end: it then counts the batch as completed.
            _count(batches[which], batches[which]["ready"] - 1, begun=batches[which]["ready"])
            batches[which]["processed"] = batches[which]["ready"]
    batches["is_last_batch"] = False
    # Lightning adds the step of a batch's end when it resumes there, and nothing between epochs.
    epoch_state["_batches_that_stepped"] = stepped - (place.kind == "batch" and place.at_step)
    return state


def _count(counts: dict[str, int], done: int, begun: int | None = None) -> None:
    begun = done if begun is None else begun
    counts.update(zip(COUNTS, (begun, begun, done, done), strict=True))


def _copy_state(value: Any) -> Any:
    return {k: _copy_state(v) for k, v in value.items()} if isinstance(value, dict) else value


def begin_epoch_anew(trainer: Trainer) -> None:
    """In `on_train_epoch_start` of a fit that resumes between two epochs: go on as a fit that was not interrupted.

    The loops forget that they were loaded, and the loader begins an iteration now, after its sampler was told the
    epoch; Lightning began one before.
    """
    forget_restart(trainer)
    trainer.fit_loop.epoch_loop.restarting = False
    if (fetcher := _fetcher(trainer)) is not None:
        iter(fetcher)


def restarting_loaders(trainer: Trainer) -> list[str]:
    """Loaders that cannot go on in an epoch's middle, by what they are."""
    loaders = trainer.fit_loop._combined_loader
    return [] if loaders is None else [type(one).__name__ for one in loaders.flattened if not _keeps_place(one)]


def _keeps_place(loader: Any) -> bool:
    if isinstance(loader, ResumableLoader):
        return loader.keeps_place
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def repeat_epoch_start(trainer: Trainer) -> None:
    """In an epoch's middle Lightning leaves out the hook that says over how many batches the epoch accumulates."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            callback.on_train_epoch_start(trainer)


def load_left_places(trainer: Trainer) -> None:
    """Tell loaders their places where they were made before the checkpoint was read: Lightning does so in time only
    where no schedule has asked for the number of steps."""
    loop, fetcher = trainer.fit_loop, _fetcher(trainer)
    if loop._combined_loader_states_to_load and fetcher is not None:
        loop._load_combined_loader_states()
        iter(fetcher)


def is_between_steps(trainer: Trainer) -> bool:
    """Whether gradients of the micro-batch that is over wait for others of their optimizer step."""
    return bool(trainer.fit_loop._should_accumulate())


def logged_steps(trainer: Trainer) -> int:
    """Steps that are over, as the log counts them: the number that the next one is logged under."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_logged(trainer: Trainer) -> bool:
    """Whether the optimizer step that is under way gets a row in the log."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (logged_steps(trainer) + 1) % every == 0


def forget_restart(trainer: Trainer) -> None:
    """Let the fit loop forget that it was loaded."""
    trainer.fit_loop._restarting = False  # its own setter says True whenever max_steps is given


def _fetcher(trainer: Trainer) -> Any:
    """What fetches batches; None before the loaders are made."""
    return trainer.fit_loop._data_fetcher
