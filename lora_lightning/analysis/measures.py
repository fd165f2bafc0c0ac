"""The measures of each layer of an adapter, of the whole adapter, and of a layer while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from statistics import median

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_lightning.analysis.adapters import Adapter, Factors, places
from lora_lightning.analysis.base_weights import Weights
from lora_lightning.analysis.spectra import (
    base_matrices,
    energy,
    expected_norm,
    frobenius,
    projection_norm,
    sampled_norm,
    smallest_rank,
    stable_rank,
    top_norm,
)
from lora_lightning.lora.frozen.spectrum import Pair, Spectrum, spectrum
from lora_lightning.lora.layers import AdaptedLayer
from lora_lightning.lora.layers.functional import wide_dtype

SHARES = {"90%": 0.9, "95%": 0.95, "99%": 0.99}
"""Shares of the energy for which the smallest ranks are computed, by their names in tables and files."""


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
    """The smallest r of the layer that holds `share` of its energy; at least 1."""
    return layer.groups * max(1, smallest_rank(layer.common_values, share))


def _spectra(pairs: Sequence[Pair], scale: float) -> tuple[list[Spectrum], Tensor]:
    """The spectra of a layer's matrices, and their singular values as those of one matrix with these blocks."""
    spectra = [spectrum(A, B, scale) for A, B in pairs]
    return spectra, torch.cat([s.S for s in spectra]).sort(descending=True).values


def measure_layer(layer: Factors, weights: Weights | None, place: tuple[str, str]) -> LayerMeasures:
    """All measures of one layer at a place, (group, block); those against W0 only where `weights` has it."""
    spectra, S = _spectra(layer.pairs, layer.scale)
    matrices = None if weights is None else weights.of(layer)
    return LayerMeasures(
        name=layer.name,
        kind=layer.kind,
        group=place[0],
        block=place[1],
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
        ranks={name: common_rank(layer, share) for name, share in SHARES.items()},
        base=None if matrices is None else _compare_with_base(layer, spectra, matrices),
    )


def _compare_with_base(layer: Factors, spectra: list[Spectrum], matrices: list[Tensor]) -> AgainstBase:
    rows = []
    for s, W0 in zip(spectra, matrices, strict=True):
        r, w0_norm = min(len(s.S) or layer.r, *W0.shape), float(torch.linalg.matrix_norm(W0.double()))
        norms = frobenius(s.S), w0_norm, projection_norm(s.U, W0, s.V)
        rows.append((*norms, top_norm(W0, r), sampled_norm(W0, r), expected_norm(w0_norm, r, layer.shape)))
    # A stack's entries are the blocks of one matrix, so that squares add up.
    norm, w0_norm, in_update, in_w0, in_random, by_chance = (math.hypot(*column) for column in zip(*rows, strict=True))
    return AgainstBase(
        w0_norm=w0_norm,
        relative=norm / w0_norm if w0_norm else math.nan,
        in_update=in_update,
        in_w0=in_w0,
        in_random=in_random,
        by_chance=by_chance,
        amplification=norm / in_update if in_update else math.nan,
    )


def measure_adapter(
    adapter: Adapter, weights: Weights | None, watch: Callable[[list[Factors]], Iterable[Factors]] = iter
) -> AdapterMeasures:
    """Measure all layers of an adapter; `watch` iterates over them, such as with a progress bar."""
    layers, place_of = [], places(layer.name for layer in adapter.factors)
    squares: dict[str, float] = {}
    for factors in watch(adapter.factors):
        layer = measure_layer(factors, weights, place_of[factors.name])
        layers.append(layer)
        squares[layer.group] = squares.get(layer.group, 0.0) + layer.norm**2
    norm = math.hypot(*(layer.norm for layer in layers))
    return AdapterMeasures(
        label=adapter.label,
        source=adapter.source,
        layers=layers,
        norm=norm,
        shares={group: square / norm**2 if norm else 0.0 for group, square in squares.items()},
        parameters=sum(layer.parameters for layer in layers),
        parameters_at={
            share: sum(f.cost(m.ranks[share]) for f, m in zip(adapter.factors, layers, strict=True)) for share in SHARES
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
        entries = vars(layer)[store].items()
        whole = {n: gather_whole(t.detach()) for n, t in entries if t is not None and n in tensors}
        twin.__dict__[store] = vars(layer)[store] | whole
    return twin


def whole_base(layer: AdaptedLayer) -> list[Tensor]:
    """W0's matrices, gathered."""
    return base_matrices(layer, gather_whole)


def base_norm(matrices: Sequence[Tensor]) -> float:
    """`||W0||_F`, accumulated in float32 or wider."""
    return math.hypot(*(float(torch.linalg.vector_norm(m, dtype=wide_dtype(m))) for m in matrices))


@torch.no_grad()
def measures_of(pairs: Sequence[Pair], scale: float, w0_norm: float, matrices: Sequence[Tensor]) -> RankMeasures:
    """The measures of a layer's matrices together, as blocks of one matrix.

    Args:
        matrices: W0's, for the amplification, in float32, since a W0 of that dtype is not copied; empty to leave it
            out.
    """
    spectra, S = _spectra(pairs, scale)
    norm, shares, room = frobenius(S), energy(S), sum(min(*A.shape, B.shape[0]) for A, B in pairs)
    projected = zip(spectra, matrices, strict=True) if matrices else ()
    inside = math.hypot(*(projection_norm(s.U, W0, s.V, torch.float32) for s, W0 in projected))
    return RankMeasures(
        norm=norm,
        relative=norm / w0_norm if w0_norm else math.nan,
        stable_rank=stable_rank(S) if norm else math.nan,
        energy_top=float(shares[0]) if norm else math.nan,
        energy_half=float(shares[min(len(S), max(1, room // 2)) - 1]) if norm else math.nan,
        k90=float(smallest_rank(S, 0.9)) if norm else math.nan,
        amplification=norm / inside if inside else math.nan,
    )


def summary(measures: Sequence[RankMeasures]) -> dict[str, float]:
    """Minimum, median and maximum of each measure over all layers where it is defined."""
    figures: dict[str, float] = {}
    for name, column in zip(NAMES, zip(*map(astuple, measures), strict=True), strict=True):
        values = [value for value in column if not math.isnan(value)]
        if values and name != "norm":  # norms of layers of other sizes cannot be compared
            for end, found in (("_min", min(values)), ("", median(values)), ("_max", max(values))):
                figures[f"rank/{name}{end}"] = found
    return figures
