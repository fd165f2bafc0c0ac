"""loralib's layers as ours, one function for each kind: the same update, the numbers moved and not computed anew.

Shapes: r the rank, V rows of an embedding of width d, k the side of a square kernel, g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A and B of one module as our layer holds them."""

    A: Tensor
    B: Tensor
    r: int
    slices: dict[str, Any] | None = None
    """The adapted parts of a `MergedLinear`."""
    delta: Callable[[], Tensor]
    """What loralib's `eval()` adds to W0, less the scale, in float64; it is (out, in) for a linear layer."""


def embedding_factors(name: str, module: nn.Embedding, A: Tensor, B: Tensor, r: int) -> Factors:
    """`h = W0[x] + s B A[:, x]` in both: A is (r, V), B is (d, r)."""
    _check_r(name, B.shape[1], r)
    _expect(name, A, B, (r, module.num_embeddings), (module.embedding_dim, r))
    if module.max_norm is not None:
        raise AdapterError(f"'{name}' has max_norm, under which loralib rewrites A as it looks rows up: no form here")
    return Factors(A=A, B=B, r=r, delta=lambda: (B.double() @ A.double()).T)


def linear_factors(
    name: str, shape: tuple[int, int], A: Tensor, B: Tensor, r: int, enabled: Sequence[bool] | None
) -> Factors:
    """`Linear`: A (r, in), B (out, r). `MergedLinear` of n parts, p of them adapted: A (p r, in), B (p out / n, r).

    Both hold the parts' A one below the other and B likewise, in order, as chosen slices do here.
    """
    (out, width), count = shape, A.shape[0] // r
    _check_r(name, B.shape[1], r)
    if count == 1 and B.shape[0] == out:
        _expect(name, A, B, (r, width), (out, r))
        return Factors(A=A, B=B, r=r, delta=lambda: B.double() @ A.double())
    _expect(name, A, B, (max(count, 1) * r, width), (B.shape[0], r))
    rows = B.shape[0] // count
    total = out // rows if rows else 0
    if rows * count != B.shape[0] or rows * total != out or count > total:
        raise AdapterError(f"'{name}': lora_B of {B.shape[0]} rows fits no {count} equal parts of {out} outputs")
    taken = _taken(name, count, total, enabled)
    names = ["q", "k", "v"] if total == 3 else [f"part{i}" for i in range(total)]

    def delta() -> Tensor:
        parts = torch.unflatten(B.double(), 0, (count, rows)) @ torch.unflatten(A.double(), 0, (count, r))
        whole = parts.new_zeros(total, rows, width)
        whole[taken] = parts
        return whole.flatten(0, 1)

    return Factors(A=A, B=B, r=r, slices={"of": names, "take": [names[i] for i in taken]}, delta=delta)


def _taken(name: str, count: int, total: int, enabled: Sequence[bool] | None) -> list[int]:
    """Numbers of the adapted parts."""
    if enabled is None and count == total:
        return list(range(total))
    example = [True] * (count - 1) + [False] * (total - count) + [True]
    if enabled is None:
        raise AdapterError(
            f"'{name}' is a MergedLinear with {count} of {total} parts adapted, and the file does not say which: pass"
            f" enable_lora as the layer had it, such as {example} for the first and the last"
        )
    taken = [i for i, flag in enumerate(enabled) if flag]
    if len(enabled) != total or len(taken) != count:
        raise AdapterError(
            f"enable_lora: '{name}' has {count} of {total} parts adapted by its shapes, got {list(enabled)}"
        )
    return taken


def conv_factors(name: str, module: nn.Module, A: Tensor, B: Tensor, r: int) -> Factors:
    """`Conv2d`: the update is `(B A).view(out, in / g, k, k)` of A (r k, in k) and B (out k / g, r k).

    Without groups, the k rows of B A that make up an output channel are k segments of its kernel, one after the other.
    So A at each segment, zero elsewhere, and B's k rows side by side are a convolution's A (r k^2, in, k, k) and
    B (out, r k^2). Where that is more than W0's own size, and under groups, whose channels the view runs across, A is
    the update itself and B picks its channel.
    """
    if not isinstance(module, nn.Conv2d):
        raise AdapterError(f"'{name}' is a {type(module).__name__}: in loralib only Conv2d can run")
    k, g = module.kernel_size[0], module.groups
    out, shape = module.out_channels, module.weight.shape
    if module.kernel_size != (k, k):
        raise AdapterError(f"'{name}' has the kernel {module.kernel_size}: loralib adapts square ones")
    _check_r(name, B.shape[1] / k, r)
    _expect(name, A, B, (r * k, module.in_channels * k), (out // g * k, r * k))

    def delta() -> Tensor:
        return (B.double() @ A.double()).view(shape)

    if g == 1 and r * k * k < out:
        placed = A.new_zeros(k, r * k, k, A.shape[1])
        segments = torch.arange(k)
        placed[segments, :, segments] = A
        return Factors(A=placed.reshape(-1, *shape[1:]), B=B.reshape(out, r * k * k, 1, 1), r=r * k * k, delta=delta)
    channel = torch.eye(out // g, dtype=B.dtype).repeat(g, 1)
    return Factors(A=(B @ A).view(shape), B=channel[:, :, None, None], r=out, delta=delta)


def _check_r(name: str, width: float, r: int) -> None:
    if width != r:
        raise AdapterError(f"'{name}': lora_B says r={width:g}, expected the r that was given, {r}")


def _expect(name: str, A: Tensor, B: Tensor, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    for what, tensor, shape in (("lora_A", A, shape_a), ("lora_B", B, shape_b)):
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"'{name}.{what}' has shape {tuple(tensor.shape)}, expected {shape}")
