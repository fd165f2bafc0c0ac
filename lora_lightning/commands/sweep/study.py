"""The study of a sweep: Optuna's storage, samplers and pruners over fits that run as processes.

One trial of Optuna's is one fit. Its user attributes hold what Optuna has no field for:

    values     {flag: text}, as on the command line, with the r that a budget chose
    seed       of the fit; None where the config's own is taken
    name       of its folder in the sweep's
    owner      [host, process of the sweep, process of the fit, heartbeat]: the last grows while the processes live
    outcome    "complete", "failed" or "superseded", where Optuna's state is FAIL; a FAIL without one was interrupted
    trainable, seconds, run, error, value

Several processes, on one machine or on many, work on one study when they name one storage. A trial belongs to the
process that got it from Optuna. Where its owner dies, another process closes it and enters its values again: the fit
resumes from its last checkpoint where the folder is shared, and begins anew where it is not.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_lightning.commands.sweep.search_space import Choices, Swept, readable_value, short_names
from lora_lightning.lora.errors import LoRAError, MissingPackageError, first_line

Sampler = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median", "hyperband"]
State = Literal["running", "complete", "pruned", "failed"]
Values = dict[str, str]
JOURNAL = "study.log"
"""Optuna's journal file in the sweep's folder, where no storage is named."""
SILENCE = 300.0
"""Seconds after which an owner without a new heartbeat counts as dead, on any machine."""
UNCLAIMED = 30.0
"""Seconds after which a trial that some process took without an owner counts as abandoned."""
NAME_LENGTH = 60
"""Characters of the values in a folder's name."""


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

    @property
    def point(self) -> tuple[tuple[str, str], ...]:
        """Its values, by which trials of several seeds belong together."""
        return tuple(self.values.items())


def folder_name(number: int, values: Values, seed: int | None) -> str:
    """A name such as `003_r-4_dropout-0.1_seed-2`, with as much of the values as fits."""
    names = short_names(list(values))
    text = "_".join(f"{names[key]}-{readable_value(value)}" for key, value in values.items())
    text = re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:NAME_LENGTH]
    return f"{number:03d}_{text}" + ("" if seed is None else f"_seed-{seed}")


class Study:
    """All fits of a sweep, shared by all processes that open the same storage and name."""

    def __init__(
        self,
        folder: Path,
        swept: Sequence[Swept],
        *,
        goal: str,
        sampler: Sampler = "grid",
        pruner: Pruner = "none",
        count: int = 0,
        storage: str | None = None,
    ) -> None:
        self.optuna = import_optuna()
        self.states = self.optuna.trial.TrialState
        self.swept, self.goal, self.count = swept, goal, count
        self.sampler = sampler if sampler != "grid" else None
        self.study = self.optuna.create_study(
            study_name=folder.name,
            storage=self._storage(storage, folder),
            direction="maximize" if goal == "max" else "minimize",
            pruner=self._pruner(pruner),
            load_if_exists=True,
        )
        self.owned: dict[int, Any] = {}
        """Optuna's handle of each trial that this process fits, by number."""
        self._beats: dict[int, tuple[int, float]] = {}
        """The last heartbeat of each other process's trial, and when it was seen first, by number."""

    # What the study is of

    def claim(self, about: dict[str, Any]) -> None:
        """Write what the study is about, or check that it agrees.

        Raises:
            LoRAError: the study has another config, metric, budget or set of flags; names the first difference.
        """
        before = self.study.user_attrs.get("about")
        if before is None:
            self.study.set_user_attr("about", about)
        elif (other := first_difference(before, about)) is not None:
            raise LoRAError(
                f"the sweep '{self.study.study_name}' exists with another {other}: give another --name; other values"
                " of the same flags, more trials and more seeds would be added to it"
            )

    def add(self, wanted: Iterable[tuple[Values, int | None]]) -> None:
        """Enter the fits of a grid that are missing, and again those that failed."""
        known = {(trial.point, trial.seed): trial for trial in self.trials(waiting=True)}
        for values, seed in wanted:
            earlier = known.get((tuple(values.items()), seed))
            if earlier is None or earlier.state == "failed":
                self._enter({}, values=values, seed=seed, name=earlier.name if earlier else None)

    def add_proposals(self, number: int, seeds: Sequence[int | None]) -> None:
        """Enter points for the sampler to choose until there are `number`, and again fits that failed."""
        trials = self.study.get_trials()
        proposals = {t.user_attrs["proposal"] for t in trials if "proposal" in t.user_attrs}
        for proposal in range(number):
            if proposal not in proposals:
                self._enter({}, proposal=proposal, seed=seeds[0])
        for trial in self.trials(waiting=True):
            if trial.state == "failed":
                self._enter(self._params(trial.values), values=trial.values, seed=trial.seed, name=trial.name)
        for values in {trial.point: trial.values for trial in self.trials(waiting=True)}.values():
            self._repeat(values, seeds)

    # The life of one fit

    def next(self, seeds: Sequence[int | None] = (None,), complete: Callable[[Values], Values] = dict) -> Trial | None:
        """Take the next fit without an owner; None where there is none at the moment.

        Args:
            seeds: repeat each point that a sampler proposes.
            complete: adds values that depend on a proposal's, such as the r of a budget.
        """
        self._take_over()
        while any(trial.state == self.states.WAITING for trial in self.study.get_trials(deepcopy=False)):
            handle = self.study.ask()
            self.owned[handle.number] = handle
            self.beat(handle.number, 0)
            attributes = handle.user_attrs
            if "values" not in attributes:
                if "proposal" not in attributes:  # another process took the last one first
                    self._close(handle, "superseded")
                    return None
                values = complete(self._suggest(handle))
                handle.set_user_attr("values", values)
                self._repeat(values, seeds[1:])
            elif self.sampler is not None:
                self._suggest(handle)  # its values were fixed when it was entered; this tells the sampler
            values, seed = handle.user_attrs["values"], attributes["seed"]
            if self._has_twin(handle.number, values, seed):
                self._close(handle, "superseded")
                continue
            if "name" not in attributes:
                handle.set_user_attr("name", folder_name(handle.number, values, seed))
            return self._view(self.study.get_trials()[handle.number])
        return None

    def beat(self, number: int, process: int) -> None:
        """Write a heartbeat of this process; `process` is the fit's, 0 before it began."""
        before = self.owned[number].user_attrs.get("owner")
        count = before[3] + 1 if before else 0
        self.owned[number].set_user_attr("owner", [socket.gethostname(), os.getpid(), process, count])

    def release(self, number: int) -> None:
        """Give up a trial, so that any process may go on with it."""
        self.owned.pop(number).set_user_attr("owner", ["", 0, 0, 0])

    def should_prune(self, trial: Trial) -> bool:
        """Report new values to the pruner, and return its decision."""
        handle = self.owned[trial.number]
        known = len(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        for step in range(known, len(trial.reported)):
            handle.report(trial.reported[step], step + 1)
        return bool(trial.reported) and bool(handle.should_prune())

    def finish(self, trial: Trial) -> None:
        """Write a fit's result."""
        handle = self.owned.pop(trial.number)
        for name in ("trainable", "seconds", "run", "error", "value"):
            handle.set_user_attr(name, getattr(trial, name))
        if trial.state == "pruned":
            self.study.tell(handle, state=self.states.PRUNED)
        elif trial.state == "complete" and trial.value is not None:
            self.study.tell(handle, trial.value)
        else:
            self._close(handle, trial.state)

    def trials(self, *, waiting: bool = False) -> list[Trial]:
        """The newest trial of each fit, in the order of their beginnings; with `waiting`, also fits not yet begun."""
        newest: dict[Any, Trial] = {}
        for frozen in self.study.get_trials():
            attributes = frozen.user_attrs
            hidden = "values" not in attributes or attributes.get("outcome") == "superseded"
            if not hidden and (waiting or frozen.state != self.states.WAITING):
                view = self._view(frozen)
                newest[view.point, view.seed] = view
        return sorted(newest.values(), key=lambda trial: trial.index)

    def unfinished(self) -> int:
        """The number of fits that wait or run."""
        return sum(not trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))

    def _enter(self, params: dict[str, Any], *, name: str | None = None, **attributes: Any) -> None:
        attributes |= {} if name is None else {"name": name}
        self.study.enqueue_trial(params, user_attrs=attributes)

    def _repeat(self, values: Values, seeds: Sequence[int | None]) -> None:
        """Enter a sampler's point with the seeds that are missing."""
        had = {t.user_attrs["seed"] for t in self.study.get_trials() if t.user_attrs.get("values") == values}
        for seed in seeds:
            if seed not in had:
                self._enter(self._params(values), values=values, seed=seed)

    def _close(self, handle: Any, outcome: str) -> None:
        self.owned.pop(handle.number, None)
        handle.set_user_attr("outcome", outcome)
        self.study.tell(handle, state=self.states.FAIL)

    def _has_twin(self, number: int, values: Values, seed: int | None) -> bool:
        """Whether the same fit is done, or runs under a smaller number: two processes may both have entered it."""
        for other in self.study.get_trials():
            differs = other.number == number or other.user_attrs.get("values") != values
            if differs or other.user_attrs.get("seed") != seed or "outcome" in other.user_attrs:
                continue
            earlier = other.state == self.states.RUNNING and other.number < number
            if earlier or other.state in (self.states.COMPLETE, self.states.PRUNED):
                return True
        return False

    def _take_over(self) -> None:
        """Enter again the unfinished fits of processes that died or released them."""
        for trial in self.study.get_trials():
            if trial.state != self.states.RUNNING or trial.number in self.owned or not self._is_left(trial):
                continue
            try:
                self.study.tell(trial.number, state=self.states.FAIL)
            except ValueError:
                continue  # another process was first
            names = {"values", "seed", "name", "proposal"} & set(trial.user_attrs)
            attributes = {name: trial.user_attrs[name] for name in names}
            self.study.enqueue_trial(trial.params, user_attrs=attributes)

    def _is_left(self, trial: Any) -> bool:
        host, sweep, fit, beat = trial.user_attrs.get("owner", [None, 0, 0, 0])
        if host in ("", socket.gethostname()) and not is_alive(sweep) and not is_alive(fit):
            return True
        last, since = self._beats.get(trial.number, (None, 0.0))
        if beat != last:
            self._beats[trial.number] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > (SILENCE if host else UNCLAIMED)

    def _view(self, frozen: Any) -> Trial:
        attributes, states = frozen.user_attrs, self.states
        named: dict[Any, State] = {states.COMPLETE: "complete", states.PRUNED: "pruned"}
        state: State = named.get(frozen.state, attributes.get("outcome", "running"))
        reported = [frozen.intermediate_values[step] for step in sorted(frozen.intermediate_values)]
        best = max if self.goal == "max" else min
        value = attributes.get("value")
        return Trial(
            number=frozen.number,
            values=attributes["values"],
            seed=attributes["seed"],
            name=attributes.get("name", f"{frozen.number:03d}"),
            state=state,
            value=best(reported) if state == "pruned" and reported else value,
            reported=reported,
            **{key: attributes.get(key) for key in ("trainable", "seconds", "run", "error")},
        )

    def _suggest(self, handle: Any) -> Values:
        """Let the sampler choose. Its seed is the trial's number, so that no two processes get the same points."""
        self.study.sampler = self._sampler(handle.number)
        values: Values = {}
        for flag in self.swept:
            if isinstance(flag, Choices):
                values[flag.key] = handle.suggest_categorical(flag.key, flag.values)
            elif flag.integer:
                values[flag.key] = str(handle.suggest_int(flag.key, int(flag.low), int(flag.high), log=flag.log))
            else:  # nine digits tell any two values of a sweep apart
                values[flag.key] = f"{handle.suggest_float(flag.key, flag.low, flag.high, log=flag.log):.9g}"
        return values

    def _params(self, values: Values) -> dict[str, Any]:
        """Values in Optuna's types; empty without a sampler."""
        if self.sampler is None:
            return {}
        types = {flag.key: str if isinstance(flag, Choices) else int if flag.integer else float for flag in self.swept}
        return {key: kind(values[key]) for key, kind in types.items()}

    def _sampler(self, seed: int) -> Any:
        samplers = self.optuna.samplers
        if self.sampler != "tpe":
            return samplers.RandomSampler(seed=seed)
        # A third at random, at most Optuna's ten: with ten of a dozen trials it would learn from two.
        random = max(2, min(10, self.count // 3))
        return samplers.TPESampler(seed=seed, n_startup_trials=random, constant_liar=True, multivariate=False)

    def _pruner(self, name: Pruner) -> Any:
        pruners = self.optuna.pruners
        if name == "median":  # Optuna waits for five, which a small sweep may not have
            return pruners.MedianPruner(n_startup_trials=2)
        return pruners.HyperbandPruner() if name == "hyperband" else pruners.NopPruner()

    def _storage(self, storage: str | None, folder: Path) -> Any:
        """Optuna's storage: a journal file, which may be in a shared folder, or a database of SQLAlchemy's."""
        if storage is None or "://" not in storage:
            file = folder / JOURNAL if storage is None else Path(storage)
            file.parent.mkdir(parents=True, exist_ok=True)
            journal = self.optuna.storages.journal
            return self.optuna.storages.JournalStorage(journal.JournalFileBackend(str(file)))
        if storage.startswith("sqlite"):
            raise LoRAError(
                f"--storage {storage}: SQLite can hand one trial to two processes: take a file for Optuna's journal:"
                f" --storage {Path(storage).stem}.log"
            )
        try:
            return self._database(storage)
        except ImportError as error:
            missing = error.__cause__ or error  # SQLAlchemy's, which names the driver
            raise MissingPackageError(
                f"--storage {_without_password(storage)} needs its database's driver ({missing}); for PostgreSQL:"
                " pip install 'psycopg[binary]' and --storage postgresql+psycopg://user@host/name"
            ) from error
        except Exception as error:
            first = first_line(error)
            raise LoRAError(
                f"--storage {_without_password(storage)} cannot be opened ({first}): expected a file for Optuna's"
                " journal, or a database as SQLAlchemy writes it, such as postgresql+psycopg://user@host/name"
            ) from error

    def _database(self, url: str) -> Any:
        """Optuna's database storage, with retries: of processes that make its tables at once all but one fail."""
        for _ in range(2):
            try:
                return self.optuna.storages.RDBStorage(url)
            except ImportError:
                raise
            except Exception:
                time.sleep(2)
        return self.optuna.storages.RDBStorage(url)


def first_difference(before: Any, now: Any, where: str = "") -> str | None:
    """The first place in which two pieces of plain data differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            difference = first_difference(before.get(key), now.get(key), f"{where}.{key}" if where else key)
            if difference is not None:
                return difference
        return None
    return None if before == now else f"{where.removeprefix('config.')} ({_shorten(before)}, now {_shorten(now)})"


def is_alive(process: int) -> bool:
    """Whether a process of this machine lives; 0 and zombies do not."""
    if not process:
        return False
    try:
        os.kill(process, 0)
        return sys.platform != "linux" or Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True


def import_optuna() -> Any:
    """Import Optuna and silence its log.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingPackageError("sweeps need optuna: pip install 'lora_lightning[sweeps]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _shorten(value: Any) -> str:
    text = readable_value(json.dumps(value))
    return text if len(text) < 60 else f"{text[:57]}..."


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1@", url)
