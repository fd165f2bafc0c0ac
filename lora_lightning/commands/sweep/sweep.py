"""A sweep: checks the request, runs the missing fits, and writes the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_lightning.commands.sweep.base_config import Base, open_base
from lora_lightning.commands.sweep.processes import FIT
from lora_lightning.commands.sweep.rank_budget import rank_for
from lora_lightning.commands.sweep.ranking import Point, rank_points
from lora_lightning.commands.sweep.report import about_of, write
from lora_lightning.commands.sweep.runner import Runner, Say, Stopped
from lora_lightning.commands.sweep.search_space import (
    MATRICES,
    RANK,
    Choices,
    Swept,
    bounds,
    first_values,
    grid_points,
    space,
)
from lora_lightning.commands.sweep.study import Pruner, Sampler, Study, Values
from lora_lightning.commands.sweep.together import Together, Watch, refuse_keys
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError
from lora_lightning.reports.figures import refuse_missing
from lora_lightning.training.population.halving import RUNGS, Halving
from lora_lightning.training.population.population import refuse_strategy
from lora_lightning.training.strategies.endings import in_all_processes


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a sweep, checked before anything is opened.

    Raises:
        LoRAError: an option is invalid, or options exclude each other.
        MissingPackageError: figures are requested, and matplotlib is not installed.
    """

    fit: Sequence[str]
    """Flags of fit, the same for every trial."""
    grid: Sequence[str] = ()
    ranges: Sequence[str] = ()
    sampler: Sampler = "grid"
    trials: int | None = None
    pruner: Pruner = "none"
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
    swept: list[Swept] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "swept", space(self.grid, self.ranges))
        if not self.swept:
            raise LoRAError("a sweep needs something to sweep: --grid model.lora.r=1,2,4,8")
        keys = [flag.key for flag in self.swept]
        if self.budget is not None and RANK in keys:
            raise LoRAError(f"--budget chooses r for each set of matrices: leave {RANK} out of --grid and --range")
        if self.budget is not None and not any(isinstance(x, Choices) and x.key == MATRICES for x in self.swept):
            raise LoRAError(
                f'--budget compares sets of matrices: give --grid "{MATRICES}=[query],[query,value],all-linear"'
            )
        if self.sampler == "grid" and self.trials is not None:
            raise LoRAError("--trials is for --sampler random or tpe: a grid has as many as it has points")
        if self.sampler != "grid" and (self.trials is None or self.trials < 1):
            raise LoRAError(f"--sampler {self.sampler} needs --trials N, at least 1")
        if self.jobs < 1:
            raise LoRAError(f"jobs must be at least 1, got {self.jobs}")
        if len(set(self.seeds)) < len(self.seeds):
            raise LoRAError(f"seeds are to differ, got {', '.join(map(str, self.seeds))}")
        if self.metric is not None and not self.metric.startswith("val"):
            raise LoRAError(f"a sweep chooses by validation, so that the test set can still judge; got {self.metric}")
        if self.together:
            self._check_together()
        elif self.halving is not None:
            raise LoRAError("--halving compares the members of one fit: give --together with it")
        if self.plots:
            refuse_missing()

    def _check_together(self) -> None:
        options = {
            "--sampler": self.sampler != "grid",
            "--jobs": self.jobs > 1,
            "--seeds": bool(self.seeds),
            "--pruner": self.pruner != "none",
            "--storage": self.storage is not None,
        }
        if unfit := [flag for flag, is_set in options.items() if is_set]:
            raise LoRAError(f"--together fits one grid in one process: leave {', '.join(unfit)} out, or --together")
        refuse_keys([flag.key for flag in self.swept], self.fit, self.grid)
        if self.halving is not None:
            Halving(self.halving, self.rungs)

    @property
    def points(self) -> int:
        """The number of combinations of values."""
        return len(grid_points(self.swept)) if self.sampler == "grid" else self.trials or 0


class Sweep:
    """A request over an opened config."""

    def __init__(self, request: Request, base: Base, command: Sequence[str] = FIT) -> None:
        self.request, self.base, self.command = request, base, command
        self.folder = Path(request.runs_dir) / (request.name or f"{base.name}-sweep")
        self.metric, self.goal = _metric(request, base)
        self.seeds: list[int | None] = [*request.seeds] or [None]
        self._check_values()
        if base.trainer is not None:
            refuse_strategy(base.trainer)
        self.ranks = self._ranks() if request.budget is not None else {}
        self.keys = [*(flag.key for flag in request.swept), *([RANK] if self.ranks else [])]
        """The swept flags, and r where a budget chooses it."""
        self.about: dict[str, Any] = {
            "metric": self.metric,
            "goal": self.goal,
            "budget": request.budget,
            "keys": self.keys,
            "config": _drop_swept(base.config, self.keys, seeds=bool(request.seeds)),
        }
        if request.together:  # decisions at rungs do not hold for other rungs
            self.about["together"] = {"halving": request.halving, "rungs": list(request.rungs)}
        if request.sampler != "grid":  # Optuna's samplers keep their first choices
            self.about["choices"] = {x.key: list(x.values) for x in request.swept if isinstance(x, Choices)}

    @property
    def count(self) -> int:
        """The number of fits."""
        return self.request.points * len(self.seeds)

    def processes(self) -> AbstractContextManager[None]:
        """Within the block all processes of a sweep `together` run: rank 0 runs the sweep, the others `follow`."""
        trainer = self.base.trainer
        return nullcontext() if trainer is None else in_all_processes(trainer, unless=(Stopped, SystemExit))

    def follow(self) -> None:
        """Take part in the fits that rank 0 has taken from the study, and write nothing."""
        with suppress(KeyboardInterrupt, Stopped):  # rank 0 reports them
            self._population().run()

    def _population(self, **options: Any) -> Together:
        options |= {"metric": self.metric, "goal": self.goal}
        options |= {"eta": self.request.halving, "rungs": self.request.rungs}
        return Together(folder=self.folder, args=self.request.fit, **options)

    def run(self, say: Say, watch: Watch = lambda _: None) -> list[Point]:
        """Run the fits that are not done, write the results, also after an interruption, and return them ranked."""
        request = self.request
        study = Study(
            self.folder,
            request.swept,
            goal=self.goal,
            sampler=request.sampler,
            pruner=request.pruner,
            count=request.points,
            storage=request.storage,
        )
        about = self.about | {"seeds": list(request.seeds)}
        if (earlier := about_of(self.folder)) is not None:  # fits of another study lie there, whose results are taken
            study.claim(earlier)
        else:
            write(self.folder, about, [], plots=False)
        study.claim(self.about)
        if request.sampler == "grid":
            wanted = [self._complete(values) for values in grid_points(request.swept)]
            study.add((values, seed) for seed in self.seeds for values in wanted)
        else:
            study.add_proposals(request.points, self.seeds)
        claim = partial(study.next, self.seeds, self._complete)
        runner: Runner | Together
        if request.together:
            runner = self._population(study=study, claim=claim, say=say, watch=watch)
        else:
            runner = Runner(
                folder=self.folder,
                args=request.fit,
                metric=self.metric,
                study=study,
                claim=claim,
                say=say,
                jobs=request.jobs,
                watched=request.pruner != "none",
                command=self.command,
                gpus=torch.cuda.device_count(),
            )
        try:
            runner.run()
        finally:
            points = rank_points(study.trials(), self.goal)
            write(self.folder, about, points, plots=request.plots)
        return points

    def _complete(self, values: Values) -> Values:
        """The values with the r that the budget chose."""
        return {**values, RANK: str(self.ranks[values[MATRICES]])} if self.ranks else dict(values)

    def _check_values(self) -> None:
        """Check every value with fit's parser before the first trial.

        Raises:
            ConfigError: a field of `model.lora` has an invalid value.
        """
        for flag in self.request.swept:
            for value in bounds(flag):
                args = [*self.request.fit, *first_values(self.request.swept), f"--{flag.key}={value}"]
                LoRAConfig(**self.base.check(args).model.lora.as_dict())  # its checks, beside its types

    def _ranks(self) -> dict[str, int]:
        """For each set of matrices the r that is nearest to the budget."""
        assert self.request.budget is not None
        sets = next(flag for flag in self.request.swept if flag.key == MATRICES)
        assert isinstance(sets, Choices)
        ranks = {}
        for value in sets.values:
            lora = self.base.check([*self.request.fit, f"--{MATRICES}={value}"]).model.lora
            config = LoRAConfig(**{**lora.as_dict(), "init": "gaussian"})
            try:
                ranks[value] = rank_for(self.base.backbone, config, self.request.budget)
            except LoRAError as error:
                raise LoRAError(f"{MATRICES}={value}: {error}") from error
        return ranks


def prepare(request: Request) -> Sweep:
    """Open the config and check everything that can be checked before the first fit.

    Raises:
        LoRAError: the request does not fit the config.
        SystemExit: `fit` refuses a flag; its line is on the screen.
    """
    first = [] if request.budget is not None else first_values(request.swept)
    return Sweep(request, open_base([*request.fit, *first], trainer=request.together))


def _metric(request: Request, base: Base) -> tuple[str, str]:
    if request.metric in (None, base.metric):
        return base.metric, request.goal or base.goal
    assert request.metric is not None
    if (near := base.why_unlogged(request.metric)) is not None:
        raise LoRAError(f"--metric {request.metric} is logged by no fit of this config{near}")
    if request.goal is None:
        raise LoRAError(
            f"--metric {request.metric} is not what the config monitors ({base.metric}): say --mode min or max"
        )
    return request.metric, request.goal


def _drop_swept(config: dict[str, Any], keys: Sequence[str], *, seeds: bool) -> dict[str, Any]:
    """The config without the swept flags."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    for key in [*keys, *(["seed_everything"] if seeds else [])]:
        *above, last = key.split(".")
        inner: Any = copy
        for part in above:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return copy
