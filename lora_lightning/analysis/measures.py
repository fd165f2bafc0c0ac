"""What is told of each layer of an adapter and of the whole, and of a layer while it trains."""

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
"""Of the energy, for which the smallest ranks are told."""


@dataclass(frozen=True, kw_only=True)
class AgainstBase:
    """The update beside W0: the paper's section 7.3 and Table 7."""

    w0_norm: float
    """`||W0||_F`."""
    relative: float
    """`||s B A||_F / ||W0||_F`."""
    in_update: float
    """`||U^T W0 V||_F` in the update's own directions."""
    in_w0: float
    """The same in as many top directions of W0 itself: the most that it can be."""
    in_random: float
    """The same in random directions, drawn once."""
    by_chance: float
    """Its root mean square over all draws."""
    amplification: float
    """`||s B A||_F / ||U^T W0 V||_F`: how much larger the update is than W0 in its directions. nan of a zero update."""


@dataclass(frozen=True, kw_only=True)
class LayerMeasures:
    """One layer's update."""

    name: str
    kind: str
    group: str
    """Layers that do the same in each block, see `places`."""
    block: str
    r: int
    scale: float
    shape: tuple[int, int]
    entries: int
    """Matrices of a stack."""
    dora: bool
    parameters: int
    norm: float
    """`||s B A||_F`."""
    largest: float
    """`||s B A||_2`."""
    stable_rank: float
    singular_values: list[float]
    """Of all entries of a stack together."""
    energy: list[float]
    """The share in the first 1, 2, ... directions."""
    ranks: dict[str, int]
    """By share of the energy, the smallest rank that holds it; of a stack's entries, the one for all of them."""
    base: AgainstBase | None


@dataclass(frozen=True, kw_only=True)
class AdapterMeasures:
    """An adapter."""

    label: str
    source: str
    layers: list[LayerMeasures]
    norm: float
    """Of all updates together."""
    shares: dict[str, float]
    """By group, its share of `norm` squared."""
    parameters: int
    parameters_at: dict[str, int]
    """By share of the energy in every layer, parameters of A and B at the smallest ranks."""
    notes: list[str] = field(default_factory=list)
    """What could not be told, and why."""


def spectra_of(layer: Factors) -> list[Spectrum]:
    """One for each entry."""
    return [spectrum(A, B, layer.scale) for A, B in layer.pairs]


def common_rank(layer: Factors, share: float) -> int:
    """The smallest rank, as the layer's kind counts it, that holds `share` of its energy; at least 1.

    Parts that keep a rank each keep the same one, so their energies are added up direction by direction.
    """
    values = [spectrum(A, B).S.square() for A, B in layer.parts]
    width = max(len(squares) for squares in values)
    together = torch.stack([F.pad(squares, (0, width - len(squares))) for squares in values]).sum(0)
    return layer.groups * max(1, smallest_rank(together.sqrt(), share))


def measure_layer(layer: Factors, weights: Weights | None, place: Place) -> LayerMeasures:
    """All measures of one layer; those beside W0 where there is one."""
    spectra = spectra_of(layer)
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
    """A stack's entries are the blocks of one matrix: squares add up."""
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
    """0.95 as `95%`, which names it in what is written."""
    return f"{share:.0%}"


def measure_adapter(
    adapter: Adapter, weights: Weights | None, advance: Callable[[int], None] = lambda _: None
) -> AdapterMeasures:
    """All layers of an adapter."""
    layers, at = [], places(layer.name for layer in adapter.factors)
    for layer in adapter.factors:
        layers.append(measure_layer(layer, weights, at[layer.name]))
        advance(1)
    gather_whole = _root_of_squares(layer.norm for layer in layers)
    groups = dict.fromkeys(layer.group for layer in layers)
    squares = {g: sum(layer.norm**2 for layer in layers if layer.group == g) for g in groups}
    return AdapterMeasures(
        label=adapter.label,
        source=adapter.source,
        layers=layers,
        norm=gather_whole,
        shares={group: square / gather_whole**2 if gather_whole else 0.0 for group, square in squares.items()},
        parameters=sum(layer.parameters for layer in layers),
        parameters_at={
            percent(share): sum(f.cost(m.ranks[percent(share)]) for f, m in zip(adapter.factors, layers, strict=True))
            for share in SHARES
        },
        notes=["DoRA: told is s B A, before magnitudes rescale W0 + s B A"] if any(m.dora for m in layers) else [],
    )


# ---- a layer while it trains, from its factors as they are now


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


def gather_whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, which all processes have to take part in; any other is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_layer(layer: AdaptedLayer) -> AdaptedLayer:
    """The layer with its adapter's tensors in one piece: another object where they are sharded."""
    lora_tensors = layer.lora_tensors()
    if not any(isinstance(tensor, DTensor) for tensor in lora_tensors.values()):
        return layer
    twin: AdaptedLayer = layer.__class__.__new__(layer.__class__)
    twin.__dict__.update(vars(layer))
    for store in ("_parameters", "_buffers"):
        held = vars(layer)[store]
        twin.__dict__[store] = {
            n: t if t is None or n not in lora_tensors else gather_whole(t.detach()) for n, t in held.items()
        }
    return twin


def whole_base(layer: AdaptedLayer) -> list[Tensor]:
    """W0's matrices, gathered."""
    return base_matrices(layer, gather_whole)


def base_norm(matrices: Sequence[Tensor]) -> float:
    """`||W0||_F`, added up in float32 or wider."""
    wide = [torch.promote_types(matrix.dtype, torch.float32) for matrix in matrices]
    norms = [torch.linalg.vector_norm(m, dtype=dtype) for m, dtype in zip(matrices, wide, strict=True)]
    return _root_of_squares(float(norm) for norm in norms)


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
    inside = _root_of_squares(
        projection_norm(s.U, W0, s.V, torch.float32) for s, W0 in zip(spectra, matrices, strict=True)
    )
    return norm / inside if inside else math.nan


def summary(measures: Sequence[RankMeasures]) -> dict[str, float]:
    """The least, the median and the largest over all layers, of what has a value."""
    figures: dict[str, float] = {}
    for name, column in zip(NAMES, zip(*map(astuple, measures), strict=True), strict=True):
        values = sorted(value for value in column if not math.isnan(value))
        if values and name != "norm":  # norms of layers of other sizes cannot be compared
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            figures |= {f"rank/{name}_min": values[0], f"rank/{name}": middle, f"rank/{name}_max": values[-1]}
    return figures
