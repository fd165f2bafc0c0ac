"""A random and B zero, so that a fresh adapter changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn


def gaussian_(A: Tensor) -> Tensor:
    """N(0, 1/in) in place, so that A x has the scale of x whatever the width and the rank.

    The paper (2106.09685, section 4.1) says Gaussian and gives no scale.
    """
    return A.normal_(std=1.0 / math.sqrt(A.numel() / A.shape[0]))


def kaiming_(A: Tensor) -> Tensor:
    """Uniform in +-1/sqrt(in) in place, as in loralib and PEFT."""
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5))


RANDOM_INITS: dict[str, Callable[[Tensor], Tensor]] = {"gaussian": gaussian_, "kaiming": kaiming_}


def init_random_(A: Tensor, B: Tensor, init: str) -> None:
    """Draw A and set B to zero, both in place and without gradients; A is Gaussian where `init` is not random."""
    RANDOM_INITS.get(init, gaussian_)(A)
    B.zero_()
