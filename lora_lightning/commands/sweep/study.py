"""What is tried next, and what is given up: a grid in its order, or Optuna's samplers and pruners."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from lora_lightning.commands.sweep.search_space import Choices, Range, Swept
from lora_lightning.commands.sweep.trial import Trial
from lora_lightning.lora.errors import LoRAError, MissingPackageError

Sampler = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median", "hyperband"]
Values = dict[str, str]


class Study(Protocol):
    """Of values and what came of them."""

    def propose(self) -> Values:
        """Values that are to be tried next."""

    def begin(self, trial: Trial) -> None:
        """A fit begins."""

    def is_hopeless(self, trial: Trial) -> bool:
        """Whether a fit should be given up, by what it has reported so far."""

    def end(self, trial: Trial) -> None:
        """A fit has ended."""


def points(swept: Sequence[Swept]) -> list[Values]:
    """Every combination of a grid, the last flag changing first.

    Raises:
        LoRAError: a range has no end of points.
    """
    for one in swept:
        if isinstance(one, Range):
            raise LoRAError(f"--range {one.key} has no grid: give --sampler random or tpe, and --trials N")
    keys = [one.key for one in swept]
    every = itertools.product(*(one.values for one in swept if isinstance(one, Choices)))
    return [dict(zip(keys, values, strict=True)) for values in every]


class Plain:
    """A grid from which nothing is pruned, and which needs no package."""

    def propose(self) -> Values:
        """A grid has its points beforehand."""
        raise AssertionError("a grid proposes nothing")

    def begin(self, trial: Trial) -> None: ...

    def is_hopeless(self, trial: Trial) -> bool:
        """Never."""
        return False

    def end(self, trial: Trial) -> None: ...


class Optuna:
    """A study of Optuna's, made anew from the trials' records whenever a sweep goes on."""

    def __init__(
        self, swept: Sequence[Swept], known: Sequence[Trial], *, sampler: Sampler, pruner: Pruner, goal: str, count: int
    ) -> None:
        self.optuna = _optuna()
        self.spaces = {one.key: self._space(one, known) for one in swept}
        direction = "maximize" if goal == "max" else "minimize"
        self.study = self.optuna.create_study(
            study_name="sweep",  # hyperband draws brackets by it, and a name of Optuna's own is another each time
            sampler=self._sampler(sampler, count, seed=len(known)),
            pruner=self._pruner(pruner),
            direction=direction,
        )
        self.told: dict[int, int] = {}
        self.live: dict[int, Any] = {}
        for trial in known:
            if trial.is_done and all(self._holds(key, trial.values.get(key)) for key in self.spaces):
                self.begin(trial)
                self.is_hopeless(trial)
                self.end(trial)

    def propose(self) -> Values:
        """The sampler's next choice; the fits that try it are begun one by one."""
        asked = self.study.ask(self.spaces)
        self.study.tell(asked, state=self.optuna.trial.TrialState.FAIL)  # each of its fits is a trial of its own
        return {key: _written(asked.params[key]) for key in self.spaces}

    def begin(self, trial: Trial) -> None:
        """Enter a fit under its own values."""
        self.study.enqueue_trial({key: self._value(key, trial.values[key]) for key in self.spaces})
        self.live[trial.number] = self.study.ask(self.spaces)
        self.told[trial.number] = 0

    def is_hopeless(self, trial: Trial) -> bool:
        """Tell the pruner what is new, and ask it."""
        asked = self.live[trial.number]
        for step in range(self.told[trial.number], len(trial.reported)):
            asked.report(trial.reported[step], step + 1)
            self.told[trial.number] = step + 1
        return bool(trial.reported) and bool(asked.should_prune())

    def end(self, trial: Trial) -> None:
        """Tell the sampler what a fit was worth."""
        states = self.optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "pruned": states.PRUNED}.get(trial.state, states.FAIL)
        finite = trial.value is not None and math.isfinite(trial.value)
        if state == states.COMPLETE and not finite:
            state = states.FAIL
        self.study.tell(self.live.pop(trial.number), trial.value if state == states.COMPLETE else None, state=state)

    def _space(self, one: Swept, known: Sequence[Trial]) -> Any:
        """Values that an earlier, other grid had stay among the choices: what came of them counts."""
        kinds = self.optuna.distributions
        if isinstance(one, Choices):
            earlier = [trial.values[one.key] for trial in known if one.key in trial.values]
            return kinds.CategoricalDistribution(tuple(dict.fromkeys([*one.values, *earlier])))
        if one.integer:
            return kinds.IntDistribution(int(one.low), int(one.high), log=one.log)
        return kinds.FloatDistribution(one.low, one.high, log=one.log)

    def _value(self, key: str, text: str) -> Any:
        kinds, space = self.optuna.distributions, self.spaces[key]
        if isinstance(space, kinds.CategoricalDistribution):
            return text
        return int(text) if isinstance(space, kinds.IntDistribution) else float(text)

    def _holds(self, key: str, text: str | None) -> bool:
        try:
            return text is not None and bool(
                self.spaces[key]._contains(self.spaces[key].to_internal_repr(self._value(key, text)))
            )
        except ValueError:
            return False

    def _sampler(self, name: Sampler, count: int, seed: int) -> Any:
        samplers = self.optuna.samplers
        if name != "tpe":
            return samplers.RandomSampler(seed=seed)
        # A third at random and at most Optuna's ten: of a dozen trials it would learn from the last two.
        return samplers.TPESampler(seed=seed, n_startup_trials=max(2, min(10, count // 3)), constant_liar=True)

    def _pruner(self, name: Pruner) -> Any:
        pruners = self.optuna.pruners
        if name == "median":  # Optuna waits for five, which a small sweep may not have
            return pruners.MedianPruner(n_startup_trials=2)
        return pruners.HyperbandPruner() if name == "hyperband" else pruners.NopPruner()


def _written(value: Any) -> str:
    """As a flag: nine digits tell any two values of a sweep apart."""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingPackageError(
            "samplers and pruners need optuna: pip install 'lora_lightning[sweeps]', or leave them out: --sampler grid"
            " --pruner none"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def study_of(
    swept: Sequence[Swept], known: Sequence[Trial], *, sampler: Sampler, pruner: Pruner, goal: str, count: int
) -> Study:
    """The one that a sweep asks for.

    Raises:
        MissingPackageError: it needs Optuna, which is not installed.
    """
    if sampler == "grid" and pruner == "none":
        return Plain()
    return Optuna(swept, known, sampler=sampler, pruner=pruner, goal=goal, count=count)


def repeated(values: Sequence[Values], seeds: Sequence[int | None]) -> Iterator[tuple[Values, int | None]]:
    """Each point once before any is repeated."""
    return ((point, seed) for seed in seeds for point in values)
