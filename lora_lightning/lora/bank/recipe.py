"""How adapters are combined, as data that is checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lora_lightning.lora.errors import ConfigError, did_you_mean

METHODS = ("concat", "svd", "ties", "dare", "dare_ties", "magnitude")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method and its numbers.

    Raises:
        ConfigError: an unknown method, or a number that is missing or that the method does not take.
    """

    method: str = "concat"
    """`concat`: the weighted sum, exactly, with the ranks added up. `svd`: its best approximation of `rank`.
    On dense updates: `ties` (trim, elect signs, disjoint mean), `dare` (drop, rescale, sum), `dare_ties` (drop,
    rescale, elect signs, disjoint mean), `magnitude` (trim, sum)."""

    rank: int | None = None
    """The rank of the result; left out, the methods on dense updates are kept exactly, at the rank of W0."""

    density: float = 1.0
    """The share of each update's entries that stays, above 0 and up to 1."""

    seed: int = 0
    """Of DARE's draws."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"method must be one of {', '.join(METHODS)}, got {self.method!r}"
                f"{did_you_mean(str(self.method), METHODS)}"
            )
        rank, density = self.rank, self.density
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ConfigError(f"rank must be a whole number of at least 1, got {rank!r}")
        if (self.method == "svd") > (rank is not None):
            raise ConfigError("method 'svd' needs the rank of the result: rank=8; 'concat' keeps all of it")
        if self.method == "concat" and rank is not None:
            raise ConfigError("method 'concat' has the ranks of the adapters added up: leave rank out, or use 'svd'")
        if isinstance(density, bool) or not isinstance(density, int | float) or not 0.0 < density <= 1.0:
            raise ConfigError(f"density must be above 0 and at most 1, got {density!r}")
        if self.on_factors and density != 1.0:
            raise ConfigError(f"method '{self.method}' keeps every entry: leave density out, or use 'ties' or 'dare'")

    @property
    def on_factors(self) -> bool:
        """Whether the update is never formed."""
        return self.method in ("concat", "svd")

    @property
    def drops(self) -> bool:
        """Whether entries are dropped at random, and not the smallest ones."""
        return self.method in ("dare", "dare_ties")

    @property
    def elects(self) -> bool:
        """Whether signs are elected."""
        return self.method in ("ties", "dare_ties")


def check_weights(weights: Mapping[str, float], names: list[str]) -> None:
    """Raise a ConfigError unless `weights` has finite numbers for adapters in `names`."""
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"weights must map names of adapters to numbers, such as {{'a': 0.7}}, got {weights!r}")
    for name, weight in weights.items():
        if name not in names:
            raise ConfigError(
                f"no adapter '{name}' here, there are {', '.join(names) or 'none'}{did_you_mean(str(name), names)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"the weight of '{name}' must be a finite number, got {weight!r}")
