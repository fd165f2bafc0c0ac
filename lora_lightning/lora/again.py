"""Gradients that can be differentiated again, for functions whose own backward works in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], g: Tensor
) -> list[Tensor | None]:
    """The gradients of `plain(*inputs)`, given that of its output; None where none is needed."""
    with torch.enable_grad():
        # Views, so that an input which was computed from another does not pass its gradient on here.
        apart = [t.view_as(t) for t in inputs]
        out = plain(*apart)
    wanted = [t for t, need in zip(apart, needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, g, create_graph=True) if wanted else ())
    return [next(found) if need else None for need in needed]
