"""The factors of every adapted layer, read from an adapter's files by PEFT's keys, without its model.

Two cases need the model and are refused without it: several adapted parameters of one module, whose order is unknown
(except for transformers' experts), and the three weights of an attention with `kdim` or `vdim`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, first_few
from lora_lightning.lora.formats.peft.config import (
    CONFIG,
    WEIGHTS,
    find_alphas,
    matching_entries,
    refuse_other_rank,
)
from lora_lightning.lora.formats.peft.keys import A_ENDS, PREFIX, WRAPPER, canonical_keys
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.frozen.spectrum import Pair, matrix_pair
from lora_lightning.lora.layers.functional import stack_factors
from lora_lightning.lora.targets.patterns import matches

OUT = f".{WRAPPER}.out_proj"
REGISTERED = ("gate_up_proj", "down_proj")
"""The order in which transformers' experts register their stacks."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One adapted layer: its update is `s B A`, or a stack of such products."""

    name: str
    """The name in the backbone of the module or bare parameter."""
    kind: str
    r: int
    """The rank of each expert; of a convolution, the sum over its groups."""
    scale: float
    """s."""
    pairs: list[Pair]
    """A (r, k) and B (m, r): one pair, or one for each entry of a stack. k is the inputs times the kernel of a
    convolution, and the number of tokens of an embedding."""
    keys: tuple[str, str] = ("", "")
    """The keys of A and B in the file."""
    peft_name: str = ""
    """The name by which PEFT looks up the rank: two projections of an attention share it."""
    groups: int = 1
    """The groups of a convolution."""
    dora: bool = False
    """Whether magnitudes rescale `W0 + s B A`; the measures are of `s B A`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k) of one entry."""
        A, B = self.pairs[0]
        return B.shape[0], A.shape[1]

    @property
    def parts(self) -> list[Pair]:
        """The parts that each have a rank, the same for all: the entries of a stack, the groups of a convolution."""
        if self.groups == 1:
            return self.pairs
        A, B = self.pairs[0]
        rows = zip(A.chunk(self.groups), B.chunk(self.groups), strict=True)
        return [(a, b.chunk(self.groups, dim=1)[g]) for g, (a, b) in enumerate(rows)]

    @property
    def parameters(self) -> int:
        """The number of parameters of A and B."""
        return sum(A.numel() + B.numel() // self.groups for A, B in self.pairs)

    def cost(self, rank: int) -> int:
        """The number of parameters at another rank."""
        return self.parameters // self.r * rank


@dataclass
class _LayerTensors:
    """One layer's tensors, before its scale is known."""

    name: str
    kind: str
    keys: tuple[str, str]
    A: Tensor
    B: Tensor
    peft_name: str
    rank: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter's files and their factors."""

    label: str
    """The name in tables and plots."""
    source: str
    """The path or name from which it was read."""
    factors: list[Factors]
    files: AdapterFiles
    tensors: dict[str, Tensor]
    """All tensors of the file, by PEFT's canonical keys."""


def read_factors(
    files: AdapterFiles, alphas: Mapping[str, float] | None = None, modules: Mapping[str, nn.Module] | None = None
) -> tuple[list[Factors], dict[str, Tensor]]:
    """Every layer's factors, sorted by name, and all tensors by PEFT's canonical keys.

    Args:
        alphas: as in `load_adapter`.
        modules: of the plain model, if there is one: they give the order in which parameters were registered.

    Raises:
        AdapterError: keys are not PEFT's, an A has no B, shapes or ranks contradict each other, or there is no layer.
    """
    tensors = canonical_keys(files.tensors)
    if strangers := [key for key in tensors if not key.startswith(PREFIX)]:
        raise AdapterError(f"{files.directory}: adapter keys must start with '{PREFIX}', got {first_few(strangers)}")
    matched = [_find_layer(key, tensors, files, modules or {}) for key in tensors if key.endswith(A_ENDS)]
    if files.record:
        # The zeros of a projection that is not adapted are not in the record.
        matched = [layer for layer in matched if layer.name in files.record.settings]
    if not matched:
        raise AdapterError(f"{files.directory / WEIGHTS} has no A and B: nothing to analyse")
    scales = _scales(matched, files, alphas or {})
    magnitudes = bool(files.peft.get("use_dora"))
    layers = [_factors(layer, scales[layer.name], dora=magnitudes) for layer in matched]
    return sorted(layers, key=lambda layer: natural_key(layer.name)), tensors


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sort key with `layer.2` before `layer.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _find_layer(
    key_a: str, tensors: Mapping[str, Tensor], files: AdapterFiles, modules: Mapping[str, nn.Module]
) -> _LayerTensors:
    end = next(end for end in A_ENDS if key_a.endswith(end))
    key_b = key_a.removesuffix(end) + end.replace("_A", "_B")
    path, A, B = key_a.removeprefix(PREFIX).removesuffix(end), tensors[key_a], tensors.get(key_b)
    if B is None:
        raise AdapterError(f"{files.directory / WEIGHTS} has '{key_a}' and no '{key_b}': it is torn")
    layer = _LayerTensors(path, "Linear", (key_a, key_b), A, B, path)
    if A.dim() < 2 or A.dim() != B.dim() or not A.shape[0] or not B.shape[1] or A.shape[0] % B.shape[1]:
        raise AdapterError(f"'{path}': A of shape {tuple(A.shape)} and B of {tuple(B.shape)} are no factors")
    layer.rank = A.shape[0]
    if end.startswith(".lora_embedding"):
        layer.kind = "Embedding"
    elif A.dim() > 2:
        layer.kind = f"Conv{A.dim() - 2}d"
    else:
        _name_wrapped(layer, path, tensors, files, modules)
    return layer


def _name_wrapped(
    layer: _LayerTensors,
    path: str,
    tensors: Mapping[str, Tensor],
    files: AdapterFiles,
    modules: Mapping[str, nn.Module],
) -> None:
    """Set the layer's name and kind from a path with PEFT's wrappers of an attention or of bare parameters."""
    if path.endswith(OUT):
        layer.peft_name = path.removesuffix(OUT)
        layer.name = f"{layer.peft_name}.out_proj"
        return
    if f"{PREFIX}{path}{OUT}.lora_A.weight" in tensors:
        layer.kind = "MultiheadAttention"
        if 3 * layer.A.shape[1] != layer.B.shape[0]:
            raise AdapterError(
                f"'{path}' is an attention with kdim or vdim, whose three weights are not told apart here"
            )
        return
    plain = path
    while plain.endswith(f".{WRAPPER}"):
        plain = plain.removesuffix(f".{WRAPPER}")
    depth = (len(path) - len(plain)) // len(f".{WRAPPER}")
    leaves = {entry.rpartition(".")[2] for entry in files.peft.get("target_parameters") or []}
    adapted = _in_order(plain, [leaf for leaf in leaves if _adapts(files, f"{plain}.{leaf}")], modules)
    if depth >= len(adapted):
        layer.name = layer.peft_name = plain
        return
    layer.kind, layer.name = "Parameter", f"{plain}.{adapted[len(adapted) - 1 - depth]}".removeprefix(".")
    layer.peft_name = layer.name
    layer.rank = _entry_rank(layer, files)
    layer.count = layer.A.shape[0] // layer.rank


def _in_order(plain: str, leaves: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Adapted parameters of one module in the order of registration, in which PEFT wraps them."""
    holder = modules.get(plain)
    known = REGISTERED if holder is None else tuple(holder._parameters)
    if len(leaves) > 1 and not {*leaves} <= {*known}:
        raise AdapterError(
            f"'{plain}' has {len(leaves)} adapted parameters, {', '.join(sorted(leaves))}, whose tensors only its model"
            f" tells apart: name its base with --base_model"
        )
    return sorted(leaves, key=known.index) if len(leaves) > 1 else leaves


def _adapts(files: AdapterFiles, name: str) -> bool:
    return matches(files.peft.get("target_parameters") or [], name.removeprefix(".")) is not None


def _entry_rank(layer: _LayerTensors, files: AdapterFiles) -> int:
    """The rank of one entry of a stack: A has the rank times the number of entries as rows."""
    if files.record and layer.name in files.record.settings:
        return files.record.settings[layer.name][0]
    ranks = set(matching_entries(files.peft.get("rank_pattern"), layer.name).values()) or {files.peft.get("r", 8)}
    fitting = sorted(int(r) for r in ranks if int(r) > 0 and layer.A.shape[0] % int(r) == 0)
    if len(fitting) != 1:
        raise AdapterError(
            f"'{layer.name}': lora_A has {layer.A.shape[0]} rows, and {CONFIG} gives it the rank"
            f" {' or '.join(map(str, sorted(ranks)))}: how many entries the stack has cannot be told"
        )
    return fitting[0]


def _scales(matched: list[_LayerTensors], files: AdapterFiles, alphas: Mapping[str, float]) -> dict[str, float]:
    """s of every layer, by name: from our record, or from PEFT's patterns."""
    if files.record:
        return {layer.name: files.record.settings[layer.name][2] for layer in matched}
    for layer in matched:
        refuse_other_rank(files.peft, layer.name, layer.peft_name, layer.rank)
    ranks = {layer.name: layer.rank for layer in matched}
    layer_alphas = find_alphas(files.peft, {layer.name: layer.peft_name for layer in matched}, ranks, alphas)
    rslora = bool(files.peft.get("use_rslora"))
    return {name: layer_alphas[name] / (math.sqrt(rank) if rslora else rank) for name, rank in ranks.items()}


def _pairs(layer: _LayerTensors) -> list[Pair]:
    if layer.count == 1:
        return [matrix_pair(layer.A, layer.B)]
    return list(zip(*stack_factors(layer.A, layer.B, layer.count), strict=True))


def _factors(layer: _LayerTensors, scale: float, *, dora: bool) -> Factors:
    groups = layer.A.shape[0] // layer.B.shape[1] if layer.A.dim() > 2 else 1
    return Factors(
        name=layer.name,
        kind=layer.kind,
        r=layer.rank,
        scale=scale,
        pairs=_pairs(layer),
        keys=layer.keys,
        peft_name=layer.peft_name,
        groups=groups,
        dora=dora,
    )
