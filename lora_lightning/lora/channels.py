"""Thin products over the channels of images: the arithmetic of a convolution of size one, by plain matrix products.

An image (n, c, size...) is worked on where it lies: as n matrices (c, places) where channels come first in memory, as
one (n places, c) where they come last; the others are put into the first order. `groups` parts the channels into equal
blocks, each with a matrix of its own.

Shapes: M (d, c / groups) takes c channels to d.
"""

from __future__ import annotations

import torch
from torch import Tensor


def through_channels(M: Tensor, x: Tensor, groups: int = 1) -> Tensor:
    """`M x` at every place: (n, c, size...) to (n, d, size...)."""
    size = x.shape[2:]
    if _comes_last(x, groups):
        return torch.mm(_rows(x), M.t()).view(x.shape[0], *size, M.shape[0]).movedim(-1, 1)
    x = _matrices(x, groups)
    return torch.bmm(_for_each(M, x, groups), x).view(-1, M.shape[0], *size)


def add_through_channels_(out: Tensor, M: Tensor, x: Tensor, groups: int = 1) -> Tensor:
    """Add `M x` to `out` (n, d, size...), which must lie in one of the two orders."""
    if _comes_last(out, groups):
        _rows(out).addmm_(_rows(x), M.t())
        return out
    x = _matrices(x, groups)
    _matrices(out, groups).baddbmm_(_for_each(M, x, groups), x)
    return out


def sum_over_places(y: Tensor, x: Tensor, groups: int = 1) -> Tensor:
    """`y x^T` summed over all places of all images: (n, d, size...) and (n, c, size...) to (d, c / groups).

    Images are added up in float32 or wider.
    """
    if _comes_last(y, groups) and _comes_last(x, groups):
        return torch.mm(_rows(y).t(), _rows(x))
    products = torch.bmm(_matrices(y, groups), _matrices(x, groups).mT)
    dtype = torch.promote_types(products.dtype, torch.float32)
    return products.view(-1, groups, *products.shape[1:]).sum(0, dtype=dtype).flatten(0, 1)


def in_order(x: Tensor, groups: int = 1) -> Tensor:
    """`x` itself where it lies in one of the two orders, else a copy in the first."""
    return x if _comes_last(x, groups) else x.contiguous()


def flat(x: Tensor) -> Tensor:
    """(n, everything of an image), in the order in memory."""
    x = x.movedim(1, -1) if _comes_last(x, 1) else x
    return x.reshape(len(x), -1)


def unflat(values: Tensor, x: Tensor) -> Tensor:
    """What was made of `flat(x)`, in the shape and order of x."""
    return values.view(x.movedim(1, -1).shape).movedim(-1, 1) if _comes_last(x, 1) else values.view(x.shape)


def _comes_last(x: Tensor, groups: int) -> bool:
    return groups == 1 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _matrices(x: Tensor, groups: int) -> Tensor:
    return x.contiguous().view(x.shape[0] * groups, x.shape[1] // groups, -1)


def _for_each(M: Tensor, x: Tensor, groups: int) -> Tensor:
    """M, or its groups' parts, once for each of the matrices `x`."""
    parts = torch.unflatten(M, 0, (groups, -1))
    return parts.expand(x.shape[0] // groups, *parts.shape).flatten(0, 1)
