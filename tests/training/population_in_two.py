"""A population in two processes, and its members' own fits. Run as `python -m tests.training.population_in_two OUT`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lora_lightning.lora.frozen.tensors import adapter_tensors, iter_base
from lora_lightning.training.checkpoints.rng_state import random_state, set_random_state
from lora_lightning.training.population.halving import Halving
from lora_lightning.training.population.population import Member, Population
from tests.processes import in_processes
from tests.training.test_population import ADAPTERS, TASK, Spoil, adam, alone, family, trainer

FAILS, HOT = "r=8, lr=0.001", "hot"
OPTIONS = {name: ADAPTERS[name] for name in ("r=1, lr=0.001", "r=2, lr=0.01", FAILS)}
OPTIONS[HOT] = {**ADAPTERS["r=8, lr=0.01"], "optimizer": adam(3.0)}
"""Of four members; one fails, and one is dropped."""


def ddp() -> dict[str, Any]:
    return {"devices": 2, "strategy": DDPStrategy(broadcast_buffers=False, find_unused_parameters=True)}


def tensors(member: Member) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapter_tensors(member.module.backbone).items()}


def fit(folder: Path) -> None:
    """Tell, in each process, what members came to, and what their own fits do."""
    backbone, data = family("bert")
    start = random_state()

    def make(name: str) -> Any:
        return trainer(folder, name, *([Spoil()] if name == FAILS else []), **ddp())

    halving = Halving(2, ["1/4", "1/2"], "val/loss", "min")
    population = Population.of(backbone, TASK(), OPTIONS, make, halving=halving)
    population.fit(data)
    members = population.members
    bases = [{place.name: id(place.tensor) for place in iter_base(member.module.backbone)} for member in members]
    found: dict[str, Any] = {
        "states": {member.name: member.state for member in members},
        "decisions": population.decisions,
        "shares_w0": all(base == bases[0] for base in bases),
        "adapters": {member.name: tensors(member) for member in members if member.state == "complete"},
        "blocks": len(members[0].standings[0].values),
        "alone": {},
    }
    for name in found["adapters"]:
        set_random_state(start)
        found["alone"][name] = alone(backbone, data, OPTIONS[name], folder, **ddp())
    (gone,) = [member for member in members if member.state == "dropped"]
    (anew,) = trainer(folder, "anew", **ddp()).validate(gone.module, data, verbose=False)
    found["validated"] = float(gone.trainer.callback_metrics["val/loss"]), anew["val/loss"]
    torch.save(found, folder / f"{members[0].trainer.global_rank}.pt")


if __name__ == "__main__":
    sys.exit(max(map(abs, in_processes(2, functools.partial(fit, Path(sys.argv[1])), timeout=400))))
