"""The whole of a sweep: what is asked, checked; its trials, old and new; and what came of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_lightning.commands.sweep.base_config import Base, opened
from lora_lightning.commands.sweep.folder import claim, without
from lora_lightning.commands.sweep.processes import FIT, locked
from lora_lightning.commands.sweep.rank_budget import rank_for
from lora_lightning.commands.sweep.ranking import Point, ranked
from lora_lightning.commands.sweep.request import Request, bounds, first_values
from lora_lightning.commands.sweep.runner import Runner, Say
from lora_lightning.commands.sweep.search_space import MATRICES, RANK, Choices
from lora_lightning.commands.sweep.study import Study, Values, points, repeated, study_of
from lora_lightning.commands.sweep.trial import Trial, named, read_all, save
from lora_lightning.commands.sweep.write import write
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError


@dataclass(kw_only=True)
class Outcome:
    """What a sweep came to."""

    folder: Path
    points: list[Point]
    keys: list[str]
    metric: str
    goal: str


class Sweep:
    """A request over an opened config, with the trials that its folder holds."""

    def __init__(self, request: Request, base: Base, command: Sequence[str] = FIT) -> None:
        self.request, self.base, self.command = request, base, command
        self.folder = Path(request.runs_dir) / (request.name or f"{base.name}-sweep")
        self.metric, self.goal = _metric(request, base)
        self.keys = [one.key for one in request.swept]
        self.about: dict[str, Any] = {
            "metric": self.metric,
            "goal": self.goal,
            "budget": request.budget,
            "seeds": list(request.seeds),
        }
        own = [*self.keys, *([RANK] if request.budget is not None else [])]
        self.about["config"] = without(base.config, own, seeds=bool(request.seeds))
        self.ranks = self._ranks() if request.budget is not None else {}
        self._check_values()

    @property
    def shown_keys(self) -> list[str]:
        """What is swept, and the r that a budget chose."""
        return [*self.keys, *([RANK] if self.ranks else [])]

    def _check_values(self) -> None:
        """Let fit's own parser see every value, so that a mistake is told before the first trial.

        Raises:
            ConfigError: a field of `model.lora` has a value that means nothing.
        """
        for one in self.request.swept:
            for value in bounds(one):
                asked = [*self.request.fit, *first_values(self.request.swept), f"--{one.key}={value}"]
                LoRAConfig(**self.base.check(asked).model.lora.as_dict())  # its own checks, beside its types

    def _ranks(self) -> dict[str, int]:
        """For each set of matrices the r that meets the budget."""
        assert self.request.budget is not None
        sets = next(one for one in self.request.swept if one.key == MATRICES)
        assert isinstance(sets, Choices)
        found = {}
        for value in sets.values:
            lora = self.base.check([*self.request.fit, f"--{MATRICES}={value}"]).model.lora
            config = LoRAConfig(**{**lora.as_dict(), "init": "gaussian"})
            try:
                found[value] = rank_for(self.base.backbone, config, self.request.budget)
            except LoRAError as error:
                raise LoRAError(f"{MATRICES}={value}: {error}") from error
        return found

    def run(self, say: Say) -> Outcome:
        """Fit what is not done yet, and write what came of it, also where it is interrupted."""
        with locked(self.folder) as lock:
            known = self._known()
            watched = self.request.pruner != "none"
            count = len(points(self.request.swept)) if self.request.sampler == "grid" else self.request.trials or 0
            study = study_of(
                self.request.swept,
                known,
                sampler=self.request.sampler,
                pruner=self.request.pruner,
                goal=self.goal,
                count=count,
            )
            runner = Runner(
                sweep=self.folder,
                args=self.request.fit,
                metric=self.metric,
                goal=self.goal,
                study=study,
                jobs=self.request.jobs,
                watched=watched,
                lock=lock,
                say=say,
                command=self.command,
                gpus=torch.cuda.device_count(),
            )
            try:
                runner.run(self._trials(known, study))
            finally:
                outcome = self._outcome(known)
                write(self.folder, self.about, outcome.points, outcome.keys, plots=self.request.plots)
        return outcome

    def count(self) -> int:
        """Fits that it has when it is done."""
        one = self.request
        number = len(points(one.swept)) if one.sampler == "grid" else one.trials or 0
        return number * max(1, len(one.seeds))

    def _known(self) -> list[Trial]:
        """Those in the folder, which belongs to one config, metric and set of flags; other values add to it.

        Raises:
            LoRAError: the folder is of another sweep.
        """
        about = {key: value for key, value in self.about.items() if key != "seeds"}
        claim(self.folder, {**about, "keys": self.shown_keys})
        return read_all(self.folder)

    def _trials(self, known: list[Trial], study: Study) -> Iterator[Trial]:
        """Those to be fitted, in order; of what was begun before, only what is not done. New ones join `known`."""
        seeds: list[int | None] = [*self.request.seeds] or [None]
        if self.request.sampler == "grid":
            wanted = repeated([self._whole(values) for values in points(self.request.swept)], seeds)
        else:
            wanted = self._proposed(known, study, seeds)
        for values, seed in wanted:
            found = next((trial for trial in known if trial.is_of(values, seed)), None)
            if found is None:
                found = named(max((trial.number for trial in known), default=-1) + 1, values, seed)
                known.append(found)
                save(found, self.folder)
            if not found.is_done:
                yield found

    def _proposed(
        self, known: list[Trial], study: Study, seeds: Sequence[int | None]
    ) -> Iterator[tuple[Values, int | None]]:
        assert self.request.trials is not None
        tried: list[Values] = []
        for trial in known:
            tried += [trial.values] if trial.values not in tried else []
        for number in range(self.request.trials):
            if number >= len(tried):
                tried.append(self._whole(study.propose()))
            for seed in seeds:
                yield tried[number], seed

    def _whole(self, values: Values) -> Values:
        """With the r that the budget chose."""
        return {**values, RANK: str(self.ranks[values[MATRICES]])} if self.ranks else values

    def _outcome(self, known: Sequence[Trial]) -> Outcome:
        return Outcome(
            folder=self.folder,
            points=ranked(known, self.goal),
            keys=self.shown_keys,
            metric=self.metric,
            goal=self.goal,
        )


def prepared(request: Request) -> Sweep:
    """Open the config and look at everything that can be looked at before the first fit.

    Raises:
        LoRAError: the request does not fit the config.
        SystemExit: `fit` refuses a flag; its line is on the screen.
    """
    first = [] if request.budget is not None else first_values(request.swept)
    return Sweep(request, opened([*request.fit, *first]))


def _metric(request: Request, base: Base) -> tuple[str, str]:
    if request.metric in (None, base.metric):
        return base.metric, request.goal or base.goal
    assert request.metric is not None
    if (near := base.unlogged(request.metric)) is not None:
        raise LoRAError(f"--metric {request.metric} is logged by no fit of this config{near}")
    if request.goal is None:
        raise LoRAError(
            f"--metric {request.metric} is not what the config monitors ({base.metric}): say --mode min or max"
        )
    return request.metric, request.goal
