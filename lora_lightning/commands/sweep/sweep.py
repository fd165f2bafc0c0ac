"""A sweep: the options, checked before anything is opened, and with the config that they vary."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_lightning.commands.sweep.base_config import Base, open_base, rank_for
from lora_lightning.commands.sweep.search_space import (
    MATRICES,
    RANK,
    Space,
    Values,
    bounds,
    first_values,
    fixed_of,
    grid_points,
    parse_space,
)
from lora_lightning.lora.errors import LoRAError
from lora_lightning.reports.figures import refuse_missing
from lora_lightning.training.population.halving import RUNGS, Halving
from lora_lightning.training.population.population import refuse_strategy

VARY = (
    "model.lora.",
    "model.optimizer",
    "model.lr_scheduler",
    "model.b_lr_ratio",
    "model.init_adapter",
    "trainer.gradient_clip_",
)
"""Flags that may differ between members of one fit; others belong to the shared W0, data or number of steps."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a sweep, checked before anything is opened.

    Raises:
        LoRAError: an option is invalid, or options exclude each other.
        MissingPackageError: Optuna is not installed, or figures are requested and matplotlib is not.
    """

    fit: Sequence[str]
    """Flags of fit, the same for every trial."""
    grid: Sequence[str] = ()
    ranges: Sequence[str] = ()
    sampler: Literal["grid", "random", "tpe"] = "grid"
    trials: int | None = None
    pruner: Literal["none", "median", "hyperband"] = "none"
    metric: str | None = None
    goal: str | None = None
    jobs: int = 1
    seeds: Sequence[int] = ()
    budget: int | None = None
    storage: str | None = None
    """Optuna's journal file or database; None is a journal in the sweep's folder."""
    name: str | None = None
    runs_dir: str = "runs"
    plots: bool = True
    together: bool = False
    halving: int | None = None
    rungs: Sequence[str] = RUNGS

    @functools.cached_property
    def space(self) -> Space:
        """The swept flags."""
        return parse_space(self.grid, self.ranges)

    def __post_init__(self) -> None:
        is_grid, budgeted, space = self.sampler == "grid", self.budget is not None, self.space
        apart = {
            "--sampler": not is_grid,
            "--jobs": self.jobs > 1,
            "--seeds": bool(self.seeds),
            "--pruner": self.pruner != "none",
            "--storage": self.storage is not None,
        }
        unfit = ", ".join(flag for flag, is_set in apart.items() if is_set)
        shared = [key for key in space if not key.startswith(VARY)]
        grid = [word for text in self.grid for word in ("--grid", text)]
        problems = {
            "a sweep needs something to sweep: --grid model.lora.r=1,2,4,8": not space,
            f"--budget chooses r for each set of matrices: leave {RANK} out of --grid and --range": (
                budgeted and RANK in space
            ),
            f'--budget compares sets of matrices: give --grid "{MATRICES}=[query],[query,value],all-linear"': (
                budgeted and not hasattr(space.get(MATRICES), "choices")
            ),
            "--trials is for --sampler random or tpe: a grid has as many as it has points": (
                is_grid and self.trials is not None
            ),
            f"--sampler {self.sampler} needs --trials N, at least 1": not is_grid and (self.trials or 0) < 1,
            f"jobs must be at least 1, got {self.jobs}": self.jobs < 1,
            f"seeds are to differ, got {', '.join(map(str, self.seeds))}": len(set(self.seeds)) < len(self.seeds),
            f"a sweep chooses by validation, so that the test set can still judge; got {self.metric}": (
                self.metric is not None and not self.metric.startswith("val")
            ),
            "--halving compares the members of one fit: give --together with it": (
                self.halving is not None and not self.together
            ),
            f"--together fits one grid in one process: leave {unfit} out, or --together": self.together and unfit,
            f"--together: '{''.join(shared[:1])}' cannot differ between members, which share W0, data, precision,"
            " strategy and the number of steps; each in a fit of its own:"
            f" {shlex.join(['lora-lightning', 'sweep', *self.fit, *grid])}": self.together and shared,
        }
        for problem, is_there in problems.items():
            if is_there:
                raise LoRAError(problem)
        if self.halving is not None:
            Halving(self.halving, self.rungs)
        if self.plots:
            refuse_missing()


class Sweep:
    """A request over an opened config, checked in all that can be checked before the first fit.

    Raises:
        LoRAError: the request does not fit the config.
        SystemExit: `fit` refuses a value; its line is on the screen.
    """

    def __init__(self, request: Request, base: Base | None = None) -> None:
        if base is None:
            first = [] if request.budget is not None else first_values(request.space)
            base = open_base([*request.fit, *first], trainer=request.together)
        self.request, self.base, self.space = request, base, request.space
        self.folder = Path(request.runs_dir) / (request.name or f"{base.name}-sweep")
        self.metric, self.goal = self._metric()
        for key, kind in self.space.items():
            for value in bounds(kind):
                base.check([*request.fit, *first_values(self.space), f"--{key}={value}"])
        if base.trainer is not None:
            refuse_strategy(base.trainer)
        self.ranks = {} if request.budget is None else self._ranks(request.budget)
        """By set of matrices the r that the budget chooses."""
        self.keys = [*self.space, *([RANK] if self.ranks else [])]
        """The swept flags, and r where a budget chooses it."""
        self.seeds: Sequence[int | None] = request.seeds or [None]
        is_grid = request.sampler == "grid"
        self.points = [self.complete(p) for p in grid_points(self.space)] if is_grid else [None] * (request.trials or 0)
        """Values of a grid; None for each that a sampler will propose."""
        self.count = len(self.points) * len(self.seeds)
        """The number of fits."""
        self.about: dict[str, Any] = {
            "metric": self.metric,
            "goal": self.goal,
            "budget": request.budget,
            "keys": self.keys,
            "config": _without(base.config, [*self.keys, *(["seed_everything"] if request.seeds else [])]),
        }
        """What makes it this sweep; one with another is refused."""
        if request.together:  # decisions at rungs do not hold for other rungs
            self.about["together"] = {"halving": request.halving, "rungs": list(request.rungs)}
        if not is_grid:
            self.about["choices"] = {key: fixed_of(values) for key, values in self.space.items()}

    def complete(self, values: Values) -> Values:
        """The values with the r that the budget chose."""
        return {**values, RANK: str(self.ranks[values[MATRICES]])} if self.ranks else values

    def _metric(self) -> tuple[str, str]:
        """What fits are ranked by, and whether it should become `min` or `max`."""
        metric, base = self.request.metric or self.base.metric, self.base
        goal = self.request.goal or (base.goal if metric == base.metric else None)
        if metric != base.metric and (near := base.why_unlogged(metric)) is not None:
            raise LoRAError(f"--metric {metric} is logged by no fit of this config{near}")
        if goal is None:
            raise LoRAError(f"--metric {metric} is not what the config monitors ({base.metric}): say --mode min or max")
        return metric, goal

    def _ranks(self, budget: int) -> dict[str, int]:
        """For each set of matrices the r that is nearest to the budget."""
        ranks = {}
        for value in bounds(self.space[MATRICES]):
            config = dataclasses.replace(self.base.check([*self.request.fit, f"--{MATRICES}={value}"]), init="gaussian")
            try:
                ranks[value] = rank_for(self.base.backbone, config, budget)
            except LoRAError as error:
                raise LoRAError(f"{MATRICES}={value}: {error}") from error
        return ranks


def _without(config: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The config without some dotted keys."""
    copied = copy.deepcopy(config)
    for key in keys:
        *above, last = key.split(".")
        inner: Any = copied
        for part in above:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return copied
