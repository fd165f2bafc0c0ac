"""Strengths of an update: the validation metrics and the drift at each, and the smallest one that is good enough."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_lightning.analysis.drift import Drift, Mean
from lora_lightning.lora.bank.strength import refuse_strength
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import Task
from lora_lightning.tasks.positions import in_evaluation, refuse_too_long

GROUPS = 10
"""Parts of the validation set, each of which is left out once."""
WITHOUT = "val_without"


@dataclass(frozen=True, kw_only=True)
class Strength:
    """One strength of the update."""

    scale: float
    drift: Drift
    metrics: dict[str, Mean] = field(default_factory=dict)
    """Of the validation set, by name; empty where they were not computed."""


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """The measured strengths, and the choice among them where there were several."""

    source: str
    """Where the texts or inputs came from on which the drift was measured."""
    found: list[Strength]
    metric: str = ""
    """The metric that chooses the run's best checkpoint, such as `accuracy`; empty without a choice."""
    mode: str = ""
    """`max` or `min`."""
    chosen: float | None = None
    """The smallest scale whose metric is within one standard error of the best one's."""
    best: float | None = None


def parse_scales(text: str) -> list[float]:
    """Strengths from `0,0.5,1`, in rising order, each once; a LoRAError where one is no finite number of at least 0."""
    scales = set()
    for name in text.split(","):
        try:
            refuse_strength(float(name))
        except (ValueError, LoRAError) as error:
            raise LoRAError(
                f"scales are numbers of at least 0 with commas between, such as 0,0.5,1, got {name.strip()!r}"
            ) from error
        scales.add(float(name))
    return sorted(scales)


def random_groups(rows: int) -> list[list[int]]:
    """The rows of a set in `GROUPS` random parts of similar size, the same each time; fewer rows get one part each."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    return [order[i::GROUPS] for i in range(min(GROUPS, rows))]


def validation_metrics(
    backbone: nn.Module,
    task: Task,
    batches: Iterable[tuple[int, Any]],
    *,
    forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Mean]:
    """The task's validation metrics of the backbone, each with its standard error.

    The error is the jackknife's: the metric m_i is computed without group i, and the error is
    `sqrt((g - 1) / g sum_i (m_i - mean)^2)` over g groups. It also holds for metrics that are no means, such as F1.
    One group gives no error.

    Args:
        backbone: adapted, at the strength to be measured.
        task: its metrics are used; a copy counts, so that its state does not change.
        batches: each with the number of its random group of rows, from 0.
        forward: a context for each forward, such as autocast.
    """
    task = copy.deepcopy(task)
    for group in range(GROUPS):
        task.add_stage(f"{WITHOUT}{group}")
    task.reset("val")
    metrics: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    with in_evaluation(backbone), torch.no_grad():
        for group, batch in batches:
            refuse_too_long(backbone, batch)
            with forward():
                out = task.evaluate(backbone, batch)
            for stage in ("val", *(f"{WITHOUT}{other}" for other in range(GROUPS) if other != group)):
                metrics[stage] = task.update(stage, out)
            seen.add(group)
    if not seen:
        raise LoRAError("the validation set has no batch")
    found: dict[str, Mean] = {}
    for key, metric in metrics["val"].items():
        name = key.removeprefix("val/")
        stages = [f"{WITHOUT}{group}" for group in seen] if len(seen) > 1 else []
        without = torch.tensor(
            [float(metrics[stage][f"{stage}/{name}"].compute()) for stage in stages], dtype=torch.float64
        )
        spread = (without - without.mean()).square().mean() * (len(seen) - 1)
        found[name] = Mean(value=float(metric.compute()), error=float(spread.sqrt()) if stages else None)
    return found


def choose(source: str, drifts: Sequence[Strength], metric: str, mode: str) -> Strengths:
    """The smallest strength within one standard error of the best; the best itself where its error is unknown."""
    sign = 1 if mode == "max" else -1
    values = {strength.scale: sign * strength.metrics[metric].value for strength in drifts}
    best = max(drifts, key=lambda strength: (values[strength.scale], -strength.scale))
    near = values[best.scale] - (best.metrics[metric].error or 0.0)
    chosen = min(scale for scale, value in values.items() if value >= near)
    return Strengths(source=source, metric=metric, mode=mode, found=list(drifts), chosen=chosen, best=best.scale)
