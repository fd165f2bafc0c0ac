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

import itertools
import json
import os
import re
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_lightning.commands.sweep.search_space import Values, import_optuna, readable_value, short_names, text_of
from lora_lightning.commands.sweep.sweep import Sweep
from lora_lightning.lora.errors import LoRAError, MissingPackageError, first_line

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
    """All fits of a sweep, shared by all processes that open the same storage and the same folder's name.

    Raises:
        LoRAError: the study exists with another `about`, with the first difference; the storage cannot be opened.
    """

    def __init__(self, sweep: Sweep) -> None:
        optuna, request, name = import_optuna(), sweep.request, sweep.folder.name
        self.sweep, self.states = sweep, optuna.trial.TrialState
        self.points: dict[str, Values | None] = {
            str(i) if values is None else json.dumps(values): values for i, values in enumerate(sweep.points)
        }
        pruners = {  # the median of Optuna waits for five, which a small sweep may not have
            "none": optuna.pruners.NopPruner,
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=2),
            "hyperband": optuna.pruners.HyperbandPruner,
        }
        self.study = optuna.create_study(
            study_name=name,
            storage=_open_storage(request.storage or str(sweep.folder / JOURNAL)),
            direction=f"{sweep.goal}imize",
            pruner=pruners[request.pruner](),
            load_if_exists=True,
        )
        refuse_other(name, self.study.user_attrs.get("about"), sweep.about)
        self.study.set_user_attr("about", sweep.about)
        self.opened_at = len(self._trials())
        """The number of trials before: a fit that failed in one of them is tried again."""
        self.owned: dict[int, Any] = {}
        """Optuna's handle of each trial that this process fits, by number."""
        self._beaten = 0.0
        self._first_seen: dict[tuple[int, int], float] = {}
        """When each heartbeat of another process was seen first, by the trial's number and the beat."""

    def is_open(self) -> bool:
        """Whether a fit waits or runs, here or in another process."""
        attempts, fits = self._attempts(), itertools.product(self.points, self.sweep.seeds)
        return not all(any(map(self._is_made, attempts[fit])) for fit in fits)

    def next(self) -> Trial | None:
        """Take the next fit that no process makes; None where there is none at the moment."""
        self._close_abandoned()
        request, space = self.sweep.request, self.sweep.space
        while fit := next(self._missing(), None):
            params, attributes = fit
            self.study.enqueue_trial(params, attributes)
            if request.sampler != "grid":
                self.study.sampler = self._sampler(int(attributes["point"]))
            handle = self.study.ask({} if request.sampler == "grid" else space)  # perhaps another process's trial
            self.owned[handle.number] = handle
            known = handle.user_attrs
            if "point" not in known or self._is_taken(handle):
                self.release(handle.number)
                continue
            self.set_owner(handle.number)
            values = known["values"] or self.sweep.complete({key: text_of(handle.params[key]) for key in space})
            name = known["name"] or folder_name(handle.number, values, known["seed"])
            handle.set_user_attr("values", values)
            handle.set_user_attr("name", name)
            return Trial(number=handle.number, values=values, seed=known["seed"], name=name)
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
        for step, value in enumerate(trial.reported[known:], known + 1):
            handle.report(value, step)
        return bool(trial.reported) and bool(handle.should_prune())

    def finish(self, trial: Trial) -> None:
        """Write a fit's result."""
        handle, states = self.owned.pop(trial.number), self.states
        if trial.state == "pruned" and trial.reported:
            trial.value = max(trial.reported) if self.sweep.goal == "max" else min(trial.reported)
        handle.set_user_attr("result", {name: getattr(trial, name) for name in RESULT})
        value = trial.value if trial.state == "complete" else None
        end = states.PRUNED if trial.state == "pruned" else states.FAIL if value is None else states.COMPLETE
        self.study.tell(handle, value, state=end)

    def release(self, number: int) -> None:
        """Give up a trial, so that any process may make its fit."""
        self.study.tell(self.owned.pop(number), state=self.states.FAIL)

    def trials(self) -> list[Trial]:
        """The newest trial of each fit that was begun, in the order of their beginnings."""
        newest = []
        for attempts in self._attempts().values():
            if named := [trial for trial in attempts if trial.user_attrs.get("name")]:
                known = named[-1].user_attrs
                fit = {name: known[name] for name in ("values", "seed", "name")}
                newest.append(Trial(number=named[-1].number, **fit, **known.get("result", {})))
        return sorted(newest, key=lambda trial: trial.index)

    def _trials(self) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False))

    def _attempts(self) -> defaultdict[tuple[str | None, int | None], list[Any]]:
        """Optuna's trials by the fit, a point and a seed, that each is an attempt at."""
        attempts = defaultdict(list)
        for trial in self._trials():
            attempts[trial.user_attrs.get("point"), trial.user_attrs.get("seed")].append(trial)
        return attempts

    def _missing(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Optuna's parameters and our attributes of each fit that is neither made nor being made, in order."""
        attempts = self._attempts()
        named = {fit: [trial for trial in trials if trial.user_attrs.get("name")] for fit, trials in attempts.items()}
        proposals = {point: trials[-1] for (point, _), trials in named.items() if trials}
        for seed, (point, values) in itertools.product(self.sweep.seeds, self.points.items()):
            if any(self._is_made(trial) or self._runs(trial) for trial in attempts[point, seed]):
                continue
            earlier = proposals.get(point)
            known = values if earlier is None else earlier.user_attrs["values"]
            if known or seed == self.sweep.seeds[0]:  # a proposal is made with the first
                name = next((trial.user_attrs["name"] for trial in named.get((point, seed), ())), None)
                params = {} if earlier is None else earlier.params
                yield params, {"point": point, "seed": seed, "values": known, "name": name}

    def _is_made(self, trial: Any) -> bool:
        """Whether a trial has a result that stays; that of a failed one stays for this command alone."""
        result = trial.user_attrs.get("result")
        return result is not None and (result["state"] != "failed" or trial.number >= self.opened_at)

    def _runs(self, trial: Any) -> bool:
        return bool(trial.state == self.states.RUNNING)

    def _is_taken(self, handle: Any) -> bool:
        """Whether the fit of a trial is made, or being made under a smaller number."""
        same = self._attempts()[handle.user_attrs["point"], handle.user_attrs["seed"]]
        return any(self._is_made(trial) or (self._runs(trial) and trial.number < handle.number) for trial in same)

    def _close_abandoned(self) -> None:
        """Close the unfinished trials of processes that died."""
        for trial in self._trials():
            if self._runs(trial) and trial.number not in self.owned and self._is_abandoned(trial):
                with suppress(ValueError):  # another process was first
                    self.study.tell(trial.number, state=self.states.FAIL)

    def _is_abandoned(self, trial: Any) -> bool:
        host, *processes = trial.user_attrs.get("owner", [None])
        if host == socket.gethostname() and not any(map(is_alive, processes)):
            return True
        now = time.monotonic()
        return now - self._first_seen.setdefault((trial.number, trial.user_attrs.get("beat", 0)), now) > SILENCE

    def _sampler(self, seed: int) -> Any:
        """The sampler. Its seed is a proposal's number, so that no two processes get the same points."""
        samplers = import_optuna().samplers
        if self.sweep.request.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        # A third at random, at most Optuna's ten: with ten of a dozen trials it would learn from two.
        random = max(2, min(10, len(self.points) // 3))
        return samplers.TPESampler(seed=seed, n_startup_trials=random, constant_liar=True, multivariate=False)


def _open_storage(place: str) -> Any:
    """Optuna's journal in a file, which may be on a shared disk, or its storage in a database of SQLAlchemy's.

    Raises:
        LoRAError: the database cannot be opened, or is SQLite.
        MissingPackageError: its driver is not installed.
    """
    storages = import_optuna().storages
    if "://" not in place:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        return storages.JournalStorage(storages.journal.JournalFileBackend(place))
    shown = "--storage " + re.sub(r"(://[^:/@]*):[^@]*@", r"\1@", place)  # without the password
    if place.startswith("sqlite"):
        raise LoRAError(
            f"{shown}: SQLite can hand one trial to two processes: take a file for Optuna's journal: --storage"
            f" {Path(place).stem}.log"
        )
    for attempt in range(3):  # of processes that make the tables at once all but one fail
        try:
            return storages.RDBStorage(place)
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
