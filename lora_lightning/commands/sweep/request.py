"""What a sweep is asked to do, checked before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_lightning.analysis import drawing
from lora_lightning.commands.sweep.search_space import MATRICES, RANK, Choices, Swept, space
from lora_lightning.commands.sweep.study import Pruner, Sampler
from lora_lightning.lora.errors import LoRAError


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to do.

    Raises:
        LoRAError: options that do not go together, or mean nothing.
        MissingPackageError: figures are wanted, and matplotlib is not installed.
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
    name: str | None = None
    runs_dir: str = "runs"
    plots: bool = True
    swept: list[Swept] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "swept", space(self.grid, self.ranges))
        if not self.swept:
            raise LoRAError("a sweep needs something to sweep: --grid model.lora.r=1,2,4,8")
        keys = [one.key for one in self.swept]
        if self.budget is not None and RANK in keys:
            raise LoRAError(f"--budget chooses r for each set of matrices: leave {RANK} out of --grid and --range")
        if self.budget is not None and not any(isinstance(one, Choices) and one.key == MATRICES for one in self.swept):
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
        if self.plots:
            drawing.refuse_missing()


def first_values(swept: Sequence[Swept]) -> list[str]:
    """One value of each, as flags: such a fit can be looked at."""
    return [f"--{one.key}={bounds(one)[0]}" for one in swept]


def bounds(one: Swept) -> list[str]:
    """The values of a grid, or the two ends of a range, as on the command line."""
    if isinstance(one, Choices):
        return list(one.values)
    return [str(int(end)) if one.integer else f"{end:.9g}" for end in (one.low, one.high)]
