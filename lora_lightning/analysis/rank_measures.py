"""What is told of an adapted layer while it trains, from its factors as they are now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_lightning.lora.frozen.spectrum import (
    Pair,
    Spectrum,
    base_matrices,
    energy,
    frobenius,
    projection_norm,
    smallest_rank,
    spectrum,
    stable_rank,
)
from lora_lightning.lora.layers import AdaptedLayer


@dataclass(frozen=True, kw_only=True)
class RankMeasures:
    """One layer at one step. nan where a number means nothing, as of an update that is still zero."""

    norm: float
    """`||s B A||_F`."""
    relative: float
    """`||s B A||_F / ||W0||_F`."""
    stable_rank: float
    energy_top: float
    """The share of the energy in the first direction."""
    energy_half: float
    """The same in the first half of the directions that the rank has room for."""
    k90: float
    """The smallest rank that holds 90% of the energy."""
    amplification: float
    """`||s B A||_F / ||U^T W0 V||_F`; nan where it was not asked for."""


NAMES = tuple(field.name for field in fields(RankMeasures))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, which all processes have to take part in; any other is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_layer(layer: AdaptedLayer) -> AdaptedLayer:
    """The layer with its adapter's tensors in one piece: another object where they are sharded."""
    own = layer.lora_tensors()
    if not any(isinstance(tensor, DTensor) for tensor in own.values()):
        return layer
    twin: AdaptedLayer = layer.__class__.__new__(layer.__class__)
    twin.__dict__.update(vars(layer))
    for store in ("_parameters", "_buffers"):
        held = vars(layer)[store]
        twin.__dict__[store] = {n: t if t is None or n not in own else whole(t.detach()) for n, t in held.items()}
    return twin


def whole_base(layer: AdaptedLayer) -> list[Tensor]:
    """W0's matrices, gathered."""
    return base_matrices(layer, whole)


def base_norm(matrices: Sequence[Tensor]) -> float:
    """`||W0||_F`, added up in float32 or wider."""
    wide = [torch.promote_types(matrix.dtype, torch.float32) for matrix in matrices]
    norms = [torch.linalg.vector_norm(m, dtype=dtype) for m, dtype in zip(matrices, wide, strict=True)]
    return _root([float(norm) for norm in norms])


@torch.no_grad()
def measures_of(pairs: Sequence[Pair], scale: float, w0_norm: float, matrices: Sequence[Tensor]) -> RankMeasures:
    """Of a layer's matrices together, as the blocks of one.

    Args:
        matrices: of W0, for the amplification; empty where it is not wanted.
    """
    spectra = [spectrum(A, B, scale) for A, B in pairs]
    S = torch.cat([s.S for s in spectra]).sort(descending=True).values
    norm, held = frobenius(S), energy(S)
    room = sum(min(A.shape[0], A.shape[1], B.shape[0]) for A, B in pairs)
    return RankMeasures(
        norm=norm,
        relative=norm / w0_norm if w0_norm else math.nan,
        stable_rank=stable_rank(S) if len(S) else math.nan,
        energy_top=float(held[0]) if len(S) else math.nan,
        energy_half=float(held[min(len(S), max(1, room // 2)) - 1]) if len(S) else math.nan,
        k90=float(smallest_rank(S, 0.9)) if len(S) else math.nan,
        amplification=_amplification(norm, spectra, matrices),
    )


def _amplification(norm: float, spectra: Sequence[Spectrum], matrices: Sequence[Tensor]) -> float:
    """In float32: W0 is multiplied as it lies where it is of that dtype."""
    if not matrices or not norm:
        return math.nan
    inside = _root([projection_norm(s.U, W0, s.V, torch.float32) for s, W0 in zip(spectra, matrices, strict=True)])
    return norm / inside if inside else math.nan


def _root(norms: Sequence[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))


def summary(found: Sequence[RankMeasures]) -> dict[str, float]:
    """The least, the median and the largest over all layers, of what has a value."""
    told: dict[str, float] = {}
    for name, column in zip(NAMES, zip(*map(astuple, found), strict=True), strict=True):
        values = sorted(value for value in column if not math.isnan(value))
        if values and name != "norm":  # norms of layers of other sizes cannot be compared
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            told |= {f"rank/{name}_min": values[0], f"rank/{name}": middle, f"rank/{name}_max": values[-1]}
    return told
