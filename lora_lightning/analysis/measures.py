"""The measures of each layer of an adapter, of the whole adapter, and of a layer while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lora_lightning.analysis.adapters import Adapter, Factors
from lora_lightning.analysis.base_weights import Weights
from lora_lightning.analysis.layer_groups import Place, places
from lora_lightning.lora.frozen.spectrum import (
    Pair,
    Spectrum,
    base_matrices,
    energy,
    expected_norm,
    frobenius,
    projection_norm,
    sampled_norm,
    smallest_rank,
    spectrum,
    stable_rank,
    top_norm,
)
from lora_lightning.lora.layers import AdaptedLayer

SHARES = (0.9, 0.95, 0.99)
"""Shares of the energy for which the smallest ranks are computed."""


@dataclass(frozen=True, kw_only=True)
class AgainstBase:
    """The update compared with W0: the paper's section 7.3 and Table 7."""

    w0_norm: float
    """`||W0||_F`."""
    relative: float
    """`||s B A||_F / ||W0||_F`."""
    in_update: float
    """`||U^T W0 V||_F` in the update's directions U and V."""
    in_w0: float
    """The same in as many top directions of W0, which is the largest possible value."""
    in_random: float
    """The same in one sample of random directions."""
    by_chance: float
    """The root mean square over all random directions."""
    amplification: float
    """`||s B A||_F / ||U^T W0 V||_F`: how much larger the update is than W0 there; nan for a zero update."""


@dataclass(frozen=True, kw_only=True)
class LayerMeasures:
    """The measures of one layer's update."""

    name: str
    kind: str
    group: str
    """The layers with the same function in each block, see `places`."""
    block: str
    r: int
    scale: float
    shape: tuple[int, int]
    entries: int
    """The number of matrices; more than 1 for a stack."""
    dora: bool
    parameters: int
    norm: float
    """`||s B A||_F`."""
    largest: float
    """`||s B A||_2`."""
    stable_rank: float
    singular_values: list[float]
    """Those of all entries of a stack together."""
    energy: list[float]
    """The share of the energy in the first 1, 2, ... directions."""
    ranks: dict[str, int]
    """By share of the energy, the smallest rank that holds it, common to all entries of a stack."""
    base: AgainstBase | None


@dataclass(frozen=True, kw_only=True)
class AdapterMeasures:
    """The measures of an adapter."""

    label: str
    source: str
    layers: list[LayerMeasures]
    norm: float
    """`||s B A||_F` of all updates together."""
    shares: dict[str, float]
    """By group, its share of `norm` squared."""
    parameters: int
    parameters_at: dict[str, int]
    """By share of the energy in every layer, parameters of A and B at the smallest ranks."""
    notes: list[str] = field(default_factory=list)
    """Remarks, such as on what the measures leave out."""


def common_rank(layer: Factors, share: float) -> int:
    """The smallest r of the layer that holds `share` of its energy; at least 1.

    All entries of a stack, and all groups of a convolution, have one rank, so their energies are added by direction.
    """
    values = [spectrum(A, B).S.square() for A, B in layer.parts]
    width = max(len(squares) for squares in values)
    together = torch.stack([F.pad(squares, (0, width - len(squares))) for squares in values]).sum(0)
    return layer.groups * max(1, smallest_rank(together.sqrt(), share))


def measure_layer(layer: Factors, weights: Weights | None, place: Place) -> LayerMeasures:
    """All measures of one layer; those against W0 only where `weights` has it."""
    spectra = [spectrum(A, B, layer.scale) for A, B in layer.pairs]
    S = torch.cat([s.S for s in spectra]).sort(descending=True).values
    matrices = None if weights is None else weights.of(layer)
    return LayerMeasures(
        name=layer.name,
        kind=layer.kind,
        group=place.group,
        block=place.block,
        r=layer.r,
        scale=layer.scale,
        shape=layer.shape,
        entries=len(layer.pairs),
        dora=layer.dora,
        parameters=layer.parameters,
        norm=frobenius(S),
        largest=float(S[0]) if len(S) else 0.0,
        stable_rank=stable_rank(S),
        singular_values=S.tolist(),
        energy=energy(S).tolist(),
        ranks={percent(share): common_rank(layer, share) for share in SHARES},
        base=None if matrices is None else _compare_with_base(layer, spectra, matrices),
    )


def _compare_with_base(layer: Factors, spectra: list[Spectrum], matrices: list[Tensor]) -> AgainstBase:
    """The measures against W0; a stack's entries are the blocks of one matrix, so that squares add up."""
    norm = _root_of_squares(frobenius(s.S) for s in spectra)
    w0_norm = _root_of_squares(float(torch.linalg.matrix_norm(W0.double())) for W0 in matrices)
    inside = _root_of_squares(projection_norm(s.U, W0, s.V) for s, W0 in zip(spectra, matrices, strict=True))
    ranks = [min(len(s.S) or layer.r, *W0.shape) for s, W0 in zip(spectra, matrices, strict=True)]
    pairs = list(zip(matrices, ranks, strict=True))
    return AgainstBase(
        w0_norm=w0_norm,
        relative=norm / w0_norm if w0_norm else math.nan,
        in_update=inside,
        in_w0=_root_of_squares(top_norm(W0, r) for W0, r in pairs),
        in_random=_root_of_squares(sampled_norm(W0, r) for W0, r in pairs),
        by_chance=_root_of_squares(
            expected_norm(float(torch.linalg.matrix_norm(W0.double())), r, layer.shape) for W0, r in pairs
        ),
        amplification=norm / inside if inside else math.nan,
    )


def _root_of_squares(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))


def percent(share: float) -> str:
    """0.95 as `95%`, which is its key in tables and files."""
    return f"{share:.0%}"


def measure_adapter(
    adapter: Adapter, weights: Weights | None, advance: Callable[[int], None] = lambda _: None
) -> AdapterMeasures:
    """Measure all layers of an adapter; `advance` is called after each."""
    layers, place_of = [], places(layer.name for layer in adapter.factors)
    for layer in adapter.factors:
        layers.append(measure_layer(layer, weights, place_of[layer.name]))
        advance(1)
    norm = _root_of_squares(layer.norm for layer in layers)
    groups = dict.fromkeys(layer.group for layer in layers)
    squares = {g: sum(layer.norm**2 for layer in layers if layer.group == g) for g in groups}
    return AdapterMeasures(
        label=adapter.label,
        source=adapter.source,
        layers=layers,
        norm=norm,
        shares={group: square / norm**2 if norm else 0.0 for group, square in squares.items()},
        parameters=sum(layer.parameters for layer in layers),
        parameters_at={
            percent(share): sum(f.cost(m.ranks[percent(share)]) for f, m in zip(adapter.factors, layers, strict=True))
            for share in SHARES
        },
        notes=["DoRA: told is s B A, before magnitudes rescale W0 + s B A"] if any(m.dora for m in layers) else [],
    )


# A layer while it trains.


@dataclass(frozen=True, kw_only=True)
class RankMeasures:
    """The measures of one layer at one step; nan where one is undefined, as for an update that is still zero."""

    norm: float
    """`||s B A||_F`."""
    relative: float
    """`||s B A||_F / ||W0||_F`."""
    stable_rank: float
    energy_top: float
    """The share of the energy in the first direction."""
    energy_half: float
    """The share in the first half of the directions that the rank allows."""
    k90: float
    """The smallest rank that holds 90% of the energy."""
    amplification: float
    """`||s B A||_F / ||U^T W0 V||_F`; nan where it was not computed."""


NAMES = tuple(field.name for field in fields(RankMeasures))


def gather_whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, in which all processes must take part; any other tensor is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_layer(layer: AdaptedLayer) -> AdaptedLayer:
    """The layer with gathered adapter tensors: a twin where they are sharded, else the layer."""
    tensors = layer.lora_tensors()
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return layer
    twin: AdaptedLayer = layer.__class__.__new__(layer.__class__)
    twin.__dict__.update(vars(layer))
    for store in ("_parameters", "_buffers"):
        entries = vars(layer)[store]
        twin.__dict__[store] = {
            n: t if t is None or n not in tensors else gather_whole(t.detach()) for n, t in entries.items()
        }
    return twin


def whole_base(layer: AdaptedLayer) -> list[Tensor]:
    """W0's matrices, gathered."""
    return base_matrices(layer, gather_whole)


def base_norm(matrices: Sequence[Tensor]) -> float:
    """`||W0||_F`, accumulated in float32 or wider."""
    wide = [torch.promote_types(matrix.dtype, torch.float32) for matrix in matrices]
    norms = [torch.linalg.vector_norm(m, dtype=dtype) for m, dtype in zip(matrices, wide, strict=True)]
    return _root_of_squares(float(norm) for norm in norms)


@torch.no_grad()
def measures_of(pairs: Sequence[Pair], scale: float, w0_norm: float, matrices: Sequence[Tensor]) -> RankMeasures:
    """The measures of a layer's matrices together, as blocks of one matrix.

    Args:
        matrices: W0's, for the amplification; empty to leave it out.
    """
    spectra = [spectrum(A, B, scale) for A, B in pairs]
    S = torch.cat([s.S for s in spectra]).sort(descending=True).values
    norm, shares = frobenius(S), energy(S)
    room = sum(min(A.shape[0], A.shape[1], B.shape[0]) for A, B in pairs)
    return RankMeasures(
        norm=norm,
        relative=norm / w0_norm if w0_norm else math.nan,
        stable_rank=stable_rank(S) if len(S) else math.nan,
        energy_top=float(shares[0]) if len(S) else math.nan,
        energy_half=float(shares[min(len(S), max(1, room // 2)) - 1]) if len(S) else math.nan,
        k90=float(smallest_rank(S, 0.9)) if len(S) else math.nan,
        amplification=_amplification(norm, spectra, matrices),
    )


def _amplification(norm: float, spectra: Sequence[Spectrum], matrices: Sequence[Tensor]) -> float:
    """The amplification, in float32: a W0 of that dtype is not copied."""
    if not matrices or not norm:
        return math.nan
    inside = _root_of_squares(
        projection_norm(s.U, W0, s.V, torch.float32) for s, W0 in zip(spectra, matrices, strict=True)
    )
    return norm / inside if inside else math.nan


def summary(measures: Sequence[RankMeasures]) -> dict[str, float]:
    """Minimum, median and maximum of each measure over all layers where it is defined."""
    figures: dict[str, float] = {}
    for name, column in zip(NAMES, zip(*map(astuple, measures), strict=True), strict=True):
        values = sorted(value for value in column if not math.isnan(value))
        if values and name != "norm":  # norms of layers of other sizes cannot be compared
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            figures |= {f"rank/{name}_min": values[0], f"rank/{name}": middle, f"rank/{name}_max": values[-1]}
    return figures
