"""What rounding left of an update, and when a person is told."""

from __future__ import annotations

from collections.abc import Mapping

KEPT = 0.9
"""Below this share of an update kept by rounding, a person is told."""


def count_low(kept: Mapping[str, float]) -> int:
    """In how many layers rounding erased more than a tenth of the update."""
    return sum(share < KEPT for share in kept.values())


def rounding_told(kept: Mapping[str, float], dtype: str) -> str | None:
    """What to tell where rounding erased more than a tenth of some layers' updates, the worst of them named.

    Args:
        kept: by module, the share that was left.
        dtype: that was rounded to.
    """
    low = count_low(kept)
    if not low:
        return None
    worst = sorted((share, name) for name, share in kept.items())[: min(3, low)]
    return (
        f"rounding to {dtype} kept less than {KEPT:.0%} of the update in {low} of {len(kept)} layers, least in"
        f" {', '.join(f'{name} ({share:.0%})' for share, name in worst)}: write the merged model with --dtype float32,"
        f" or use the adapter, which lost nothing"
    )
