"""One fit of a sweep, and the file in its folder that says how it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from lora_lightning.commands.sweep.search_space import plainly, short_names
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import write_bytes

RECORD, LOG = "trial.json", "log.txt"
State = Literal["running", "complete", "pruned", "failed"]
MOST = 60
"""Characters of a folder's name that tell the values."""


@dataclass(kw_only=True)
class Trial:
    """What is fitted and what came of it."""

    number: int
    values: dict[str, str]
    """By flag, as on the command line."""
    seed: int | None = None
    """Of the fit where the sweep repeats each over several; None is the config's own."""
    name: str
    """Of its folder in the sweep's."""
    state: State = "running"
    """Also of a fit whose sweep was killed: it goes on when the sweep does."""
    value: float | None = None
    """Of the metric that ranks."""
    reported: list[float] = field(default_factory=list)
    """The metric after each validation, where a pruner asked for it."""
    trainable: int | None = None
    seconds: float | None = None
    """Of training, all fits that went on from one another together."""
    run: str | None = None
    """The run's folder."""
    error: str | None = None
    """One line, of a fit that failed."""

    @property
    def is_done(self) -> bool:
        """Whether it needs no further fit; one that failed is tried again when the sweep is."""
        return self.state in ("complete", "pruned")

    def is_of(self, values: Mapping[str, str], seed: int | None) -> bool:
        """Whether it is the fit with these values."""
        return self.values == dict(values) and self.seed == seed


def named(number: int, values: Mapping[str, str], seed: int | None) -> Trial:
    """A new one; its folder's name tells its values as far as they go."""
    names = short_names(list(values))
    told = "_".join(f"{names[key]}-{plainly(value)}" for key, value in values.items())
    told = re.sub(r"[^\w.+-]+", "-", told).strip("-.")[:MOST]
    end = "" if seed is None else f"_seed-{seed}"
    return Trial(number=number, values=dict(values), seed=seed, name=f"{number:03d}_{told}{end}")


def save(trial: Trial, sweep: Path) -> None:
    """Write it into its folder, whole or not at all."""
    write_bytes(sweep / trial.name / RECORD, (json.dumps(asdict(trial), indent=2) + "\n").encode())


def read_all(sweep: Path) -> list[Trial]:
    """Those of a sweep so far, in their order.

    Raises:
        LoRAError: a record was changed by hand into something else.
    """
    found = []
    known = {own.name for own in fields(Trial)}
    for file in sorted(sweep.glob(f"*/{RECORD}")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found.append(Trial(**{key: value for key, value in content.items() if key in known}))
        except (ValueError, TypeError, AttributeError) as error:
            raise LoRAError(
                f"'{file}' is no record of a trial ({error}): delete its folder, and it is run anew"
            ) from error
    return sorted(found, key=lambda trial: trial.number)
