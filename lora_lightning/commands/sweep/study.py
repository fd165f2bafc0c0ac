"""The study of a sweep: Optuna's storage, samplers and pruners over fits that run as processes.

A point is a combination of values, and a fit is a point with a seed. Each trial of Optuna's is one attempt at a fit,
and its user attributes hold what Optuna has no field for:

    point    the text of a grid's values, or the number of a sampler's proposal; with `seed` it says which fit it is
    values   {flag: text}, as on the command line, with the r that a budget chose
    name     of the fit's folder in the sweep's, the same for each attempt
    owner    [host, process of the sweep, process of the fit], and `beat`, which grows while the sweep lives
    result   the fields of `Trial` that its end sets; a trial that Optuna calls failed and that has none was interrupted

Several processes, on one machine or on many, work on one study when they name one storage. A process enters a trial
for a fit that is neither made nor being made. Where two enter the same one, the trial with the smaller number goes on.
Where a trial's owner dies, another process closes it, so that its fit is missing again: a new trial resumes from the
last checkpoint where the folder is shared, and begins anew where it is not.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_lightning.commands.sweep.search_space import (
    Space,
    Values,
    import_optuna,
    readable_value,
    short_names,
    text_of,
)
from lora_lightning.lora.errors import LoRAError, MissingPackageError, first_line

Sampler = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median", "hyperband"]
State = Literal["running", "complete", "pruned", "failed"]
JOURNAL = "study.log"
"""Optuna's journal file in the sweep's folder, where no storage is named."""
BEAT, SILENCE = 30.0, 300.0
"""Seconds between two heartbeats, and after which an owner without a new one counts as dead."""
NAME_LENGTH = 60
"""Characters of the values in a folder's name."""
RESULT = ("state", "value", "reported", "trainable", "seconds", "run", "error")


@dataclass(kw_only=True)
class Trial:
    """One fit in the study."""

    number: int
    values: Values
    seed: int | None = None
    name: str
    state: State = "running"
    value: float | None = None
    """The metric of the best checkpoint; None where it was not finite."""
    reported: list[float] = field(default_factory=list)
    """The metric after each validation, where there is a pruner."""
    trainable: int | None = None
    seconds: float | None = None
    run: str | None = None
    error: str | None = None

    @property
    def index(self) -> int:
        """Its place in the order in which fits were first begun."""
        return int(self.name.partition("_")[0])


def folder_name(number: int, values: Values, seed: int | None) -> str:
    """A name such as `003_r-4_dropout-0.1_seed-2`, with as much of the values as fits."""
    names = short_names(list(values))
    text = "_".join(f"{names[key]}-{readable_value(value)}" for key, value in values.items())
    text = re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:NAME_LENGTH]
    return f"{number:03d}_{text}" + ("" if seed is None else f"_seed-{seed}")


class Study:
    """All fits of a sweep, shared by all processes that open the same storage and name.

    Args:
        folder: the sweep's, whose name is the study's.
        space: the swept flags.
        about: what makes it this study: the config, the metric and the like, as plain data.
        points: the values of a grid's points, or the number of a sampler's.
        seeds: with each of which every point is fitted.
        complete: adds values that depend on a sampler's, such as the r of a budget.

    Raises:
        LoRAError: the study exists with another `about`, with the first difference; the storage cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        about: Mapping[str, Any],
        points: Sequence[Values] | int,
        *,
        goal: str,
        seeds: Sequence[int | None] = (None,),
        sampler: Sampler = "grid",
        pruner: Pruner = "none",
        storage: str | None = None,
        complete: Callable[[Values], Values] = dict,
    ) -> None:
        self.optuna = import_optuna()
        self.states = self.optuna.trial.TrialState
        self.best = max if goal == "max" else min
        self.space, self.sampler, self.seeds, self.complete = space, sampler, seeds, complete
        self.points: dict[str, Values | None] = (
            dict.fromkeys(map(str, range(points)))
            if isinstance(points, int)
            else {json.dumps(values): values for values in points}
        )
        pruners = self.optuna.pruners
        self.study = self.optuna.create_study(
            study_name=folder.name,
            storage=_journal(folder, storage) if storage is None or "://" not in storage else _database(storage),
            direction=f"{goal}imize",
            pruner={  # the median of Optuna waits for five, which a small sweep may not have
                "none": pruners.NopPruner,
                "median": lambda: pruners.MedianPruner(n_startup_trials=2),
                "hyperband": pruners.HyperbandPruner,
            }[pruner](),
            load_if_exists=True,
        )
        refuse_other(folder.name, self.study.user_attrs.get("about"), about)
        self.study.set_user_attr("about", about)
        self.opened_at = len(self._trials())
        """The number of trials before: a fit that failed in one of them is tried again."""
        self.owned: dict[int, Any] = {}
        """Optuna's handle of each trial that this process fits, by number."""
        self._beaten = 0.0
        self._first_seen: dict[tuple[int, int], float] = {}
        """When each heartbeat of another process was seen first, by the trial's number and the beat."""

    def is_open(self) -> bool:
        """Whether a fit waits or runs, here or in another process."""
        return bool(self._missing(also_running=True))

    def next(self) -> Trial | None:
        """Take the next fit that no process makes; None where there is none at the moment."""
        self._close_abandoned()
        while missing := self._missing():
            self.study.enqueue_trial(*missing[0])
            if self.sampler != "grid":
                self.study.sampler = self._sampler(int(missing[0][1]["point"]))
            handle = self.study.ask({} if self.sampler == "grid" else self.space)  # perhaps another process's trial
            self.owned[handle.number] = handle
            fit = handle.user_attrs
            if "point" not in fit or self._is_taken(handle.number):
                self.release(handle.number)
                continue
            self.set_owner(handle.number)
            values = fit["values"] or self.complete({key: text_of(handle.params[key]) for key in self.space})
            handle.set_user_attr("values", values)
            handle.set_user_attr("name", fit["name"] or folder_name(handle.number, values, fit["seed"]))
            return self._view(self._trials()[handle.number])
        return None

    def set_owner(self, number: int, process: int = 0) -> None:
        """Write who makes a fit: this process and, once it has begun, the fit's."""
        self.owned[number].set_user_attr("owner", [socket.gethostname(), os.getpid(), process])

    def beat(self) -> None:
        """Write a heartbeat for other processes, where it is time for one."""
        if time.monotonic() - self._beaten > BEAT:
            self._beaten = time.monotonic()
            for handle in self.owned.values():
                handle.set_user_attr("beat", handle.user_attrs.get("beat", 0) + 1)

    def should_prune(self, trial: Trial) -> bool:
        """Report new values to the pruner, and return its decision."""
        handle = self.owned[trial.number]
        known = len(self._trials()[trial.number].intermediate_values)
        for step in range(known, len(trial.reported)):
            handle.report(trial.reported[step], step + 1)
        return bool(trial.reported) and bool(handle.should_prune())

    def finish(self, trial: Trial) -> None:
        """Write a fit's result."""
        handle, states = self.owned.pop(trial.number), self.states
        if trial.state == "pruned" and trial.reported:
            trial.value = self.best(trial.reported)
        handle.set_user_attr("result", {name: getattr(trial, name) for name in RESULT})
        value = trial.value if trial.state == "complete" else None
        end = states.PRUNED if trial.state == "pruned" else states.FAIL if value is None else states.COMPLETE
        self.study.tell(handle, value, state=end)

    def release(self, number: int) -> None:
        """Give up a trial, so that any process may make its fit."""
        self.study.tell(self.owned.pop(number), state=self.states.FAIL)

    def trials(self) -> list[Trial]:
        """The newest trial of each fit that was begun, in the order of their beginnings."""
        newest = {_fit(trial): self._view(trial) for trial in self._trials() if trial.user_attrs.get("name")}
        return sorted(newest.values(), key=lambda trial: trial.index)

    def _trials(self) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False))

    def _missing(self, *, also_running: bool = False) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Optuna's parameters and our attributes of each fit that is neither made nor being made, in order."""
        trials = self._trials()
        there = {_fit(trial) for trial in trials if self._is_made(trial) or (self._runs(trial) and not also_running)}
        points: dict[str, Any] = {point: ({}, values) for point, values in self.points.items()}
        names: dict[Any, str] = {}
        for trial in trials:
            if trial.user_attrs.get("name") and (point := trial.user_attrs["point"]) in points:
                points[point] = trial.params, trial.user_attrs["values"]
                names[_fit(trial)] = trial.user_attrs["name"]
        return [
            (params, {"point": point, "seed": seed, "values": values, "name": names.get((point, seed))})
            for seed in self.seeds
            for point, (params, values) in points.items()
            if (point, seed) not in there and (values or seed == self.seeds[0])  # a proposal is made with the first
        ]

    def _is_made(self, trial: Any) -> bool:
        """Whether a trial has a result that stays; that of a failed one stays for this command alone."""
        result = trial.user_attrs.get("result")
        return result is not None and (result["state"] != "failed" or trial.number >= self.opened_at)

    def _runs(self, trial: Any) -> bool:
        return bool(trial.state == self.states.RUNNING)

    def _is_taken(self, number: int) -> bool:
        """Whether the fit of a trial is made, or being made under a smaller number."""
        trials = self._trials()
        same = [trial for trial in trials if _fit(trial) == _fit(trials[number])]
        return any(self._is_made(trial) or (self._runs(trial) and trial.number < number) for trial in same)

    def _close_abandoned(self) -> None:
        """Close the unfinished trials of processes that died."""
        for trial in self._trials():
            if self._runs(trial) and trial.number not in self.owned and self._is_abandoned(trial):
                try:
                    self.study.tell(trial.number, state=self.states.FAIL)
                except ValueError:
                    continue  # another process was first

    def _is_abandoned(self, trial: Any) -> bool:
        host, *processes = trial.user_attrs.get("owner", [None])
        if host == socket.gethostname() and not any(map(is_alive, processes)):
            return True
        now = time.monotonic()
        return now - self._first_seen.setdefault((trial.number, trial.user_attrs.get("beat", 0)), now) > SILENCE

    def _view(self, frozen: Any) -> Trial:
        known = frozen.user_attrs
        fit = {name: known[name] for name in ("values", "seed", "name")}
        return Trial(number=frozen.number, **fit, **known.get("result", {}))

    def _sampler(self, seed: int) -> Any:
        """The sampler. Its seed is a proposal's number, so that no two processes get the same points."""
        samplers = self.optuna.samplers
        if self.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        # A third at random, at most Optuna's ten: with ten of a dozen trials it would learn from two.
        random = max(2, min(10, len(self.points) // 3))
        return samplers.TPESampler(seed=seed, n_startup_trials=random, constant_liar=True, multivariate=False)


def _fit(trial: Any) -> tuple[str | None, int | None]:
    """What a trial is an attempt at: a point, and a seed."""
    return trial.user_attrs.get("point"), trial.user_attrs.get("seed")


def _journal(folder: Path, storage: str | None) -> Any:
    """Optuna's journal, a file that may be in a shared folder."""
    file = folder / JOURNAL if storage is None else Path(storage)
    file.parent.mkdir(parents=True, exist_ok=True)
    storages = import_optuna().storages
    return storages.JournalStorage(storages.journal.JournalFileBackend(str(file)))


def _database(url: str) -> Any:
    """Optuna's storage in a database of SQLAlchemy's.

    Raises:
        LoRAError: it cannot be opened, or is SQLite.
        MissingPackageError: the database's driver is not installed.
    """
    shown = "--storage " + re.sub(r"(://[^:/@]*):[^@]*@", r"\1@", url)  # without the password
    if url.startswith("sqlite"):
        raise LoRAError(
            f"{shown}: SQLite can hand one trial to two processes: take a file for Optuna's journal: --storage"
            f" {Path(url).stem}.log"
        )
    for attempt in range(3):  # of processes that make the tables at once all but one fail
        try:
            return import_optuna().storages.RDBStorage(url)
        except ImportError as error:
            missing = error.__cause__ or error  # SQLAlchemy's, which names the driver
            raise MissingPackageError(
                f"{shown} needs its database's driver ({missing}); for PostgreSQL: pip install 'psycopg[binary]' and"
                " --storage postgresql+psycopg://user@host/name"
            ) from error
        except Exception as error:
            if attempt == 2:
                raise LoRAError(
                    f"{shown} cannot be opened ({first_line(error)}): expected a file for Optuna's journal, or a"
                    " database as SQLAlchemy writes it, such as postgresql+psycopg://user@host/name"
                ) from error
            time.sleep(2)
    raise AssertionError


def refuse_other(name: str, before: Mapping[str, Any] | None, about: Mapping[str, Any]) -> None:
    """Raise where the sweep of this name exists and is about something else, with the first difference."""
    if before is not None and (other := first_difference(before, about)) is not None:
        raise LoRAError(
            f"the sweep '{name}' exists with another {other}: give another --name; other values of the same flags, more"
            " trials and more seeds would be added to it"
        )


def first_difference(before: Any, now: Any, where: str = "") -> str | None:
    """The first place in which two pieces of plain data differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = (
            first_difference(before.get(key), now.get(key), f"{where}.{key}" if where else key)
            for key in sorted({*before, *now})
        )
        return next(filter(None, inner), None)
    return None if before == now else f"{where.removeprefix('config.')} ({_shorten(before)}, now {_shorten(now)})"


def _shorten(value: Any) -> str:
    text = readable_value(json.dumps(value))
    return text if len(text) < 60 else f"{text[:57]}..."


def is_alive(process: int) -> bool:
    """Whether a process of this machine lives; 0 and zombies do not."""
    try:
        os.kill(process, 0)
        return process > 0 and (sys.platform != "linux" or ") Z " not in Path(f"/proc/{process}/stat").read_text())
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True
