"""The factors of every adapted layer, read from an adapter's files by PEFT's keys, without its model.

Two cases need the model and are refused without it: several adapted parameters of one module, whose order is unknown
(except for transformers' experts), and the three weights of an attention with `kdim` or `vdim`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_lightning.analysis.spectra import matrix_pair
from lora_lightning.lora.errors import AdapterError, first_few
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS, find_alphas, possible_ranks
from lora_lightning.lora.formats.peft.keys import A_ENDS, PREFIX, WRAPPER, canonical_keys
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.frozen.spectrum import Pair, spectrum
from lora_lightning.lora.frozen.tensors import full_name
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
    scale: float = math.nan
    """s."""
    pairs: list[Pair]
    """A (r, k) and B (m, r): one pair, or one for each entry of a stack. k is the inputs times the kernel of a
    convolution, and the number of tokens of an embedding."""
    keys: tuple[str, str]
    """The keys of A and B in the file."""
    peft_name: str
    """The name by which PEFT looks up the rank: two projections of an attention share it."""
    groups: int
    """The groups of a convolution."""
    dora: bool
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

    @cached_property
    def common_values(self) -> Tensor:
        """(q,): singular values of all parts together, which have one rank, so that energies add by direction."""
        return pad_sequence([spectrum(A, B).S.square() for A, B in self.parts]).sum(1).sqrt()

    @property
    def parameters(self) -> int:
        """The number of parameters of A and B."""
        return sum(A.numel() + B.numel() // self.groups for A, B in self.pairs)

    def cost(self, rank: int) -> int:
        """The number of parameters at another rank."""
        return self.parameters // self.r * rank


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
    ends = {key: end for key in tensors for end in A_ENDS if key.endswith(end)}
    layers = [_read_layer(key, end, tensors, files, modules or {}) for key, end in ends.items()]
    if files.record:
        scales = {name: scale for name, (_, _, scale) in files.record.settings.items()}
        # The zeros of a projection that is not adapted are not in the record.
        layers = [layer for layer in layers if layer.name in scales]
    else:
        scales = _scales(layers, files.peft, alphas or {})
    if not layers:
        raise AdapterError(f"{files.directory / WEIGHTS} has no A and B: nothing to analyse")
    layers = [replace(layer, scale=scales[layer.name]) for layer in layers]
    return sorted(layers, key=lambda layer: _natural_key(layer.name)), tensors


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sort key with `layer.2` before `layer.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The group and the block of each layer, by name.

    The block is the numbers in its name, `3` or `0.11`, empty where there is none. The group is the rest, without the
    beginning that all numbered layers share, so that layers with the same function in each block have one group.
    """
    words = {name: [part for part in name.split(".") if not part.isdigit()] for name in names}
    blocks = {name: ".".join(part for part in name.split(".") if part.isdigit()) for name in words}
    columns = zip(*(parts[:-1] for name, parts in words.items() if blocks[name]), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    cut = {name: parts[shared if blocks[name] else 0 :] for name, parts in words.items()}
    return {name: (".".join(parts) or "layers", blocks[name]) for name, parts in cut.items()}


def _read_layer(
    key_a: str, end: str, tensors: Mapping[str, Tensor], files: AdapterFiles, modules: Mapping[str, nn.Module]
) -> Factors:
    """One layer without its scale. In what form PEFT wrote it, its keys and shapes say."""
    path = f".{key_a.removeprefix(PREFIX)}".removesuffix(end).removeprefix(".")  # empty for the model itself
    key_b = key_a.removesuffix(end) + end.replace("_A", "_B")
    A, B = tensors[key_a], tensors.get(key_b)
    if B is None:
        raise AdapterError(f"{files.directory / WEIGHTS} has '{key_a}' and no '{key_b}': it is torn")
    if A.dim() < 2 or A.dim() != B.dim() or not A.shape[0] or not B.shape[1] or A.shape[0] % B.shape[1]:
        raise AdapterError(f"'{path}': A of shape {tuple(A.shape)} and B of {tuple(B.shape)} are no factors")
    kind, name, peft_name, rank, groups = "Linear", path, path, A.shape[0], 1
    if end.startswith(".lora_embedding"):
        kind = "Embedding"
    elif A.dim() > 2:
        kind, groups = f"Conv{A.dim() - 2}d", A.shape[0] // B.shape[1]
    elif path.endswith(OUT):
        peft_name = path.removesuffix(OUT)
        name = f"{peft_name}.out_proj"
    elif f"{PREFIX}{path}{OUT}.lora_A.weight" in tensors:
        kind = "MultiheadAttention"
        if 3 * A.shape[1] != B.shape[0]:
            raise AdapterError(
                f"'{path}' is an attention with kdim or vdim, whose three weights are not told apart here"
            )
    else:
        name, is_parameter = _unwrap(path, files.peft, modules)
        peft_name = name
        if is_parameter:
            kind, rank = "Parameter", _entry_rank(name, A.shape[0], files)
    count = A.shape[0] // rank
    pairs = [matrix_pair(A, B)] if count == 1 else list(zip(*stack_factors(A, B, count), strict=True))
    dora = bool(files.peft.get("use_dora"))
    return Factors(
        name=name, kind=kind, r=rank, pairs=pairs, keys=(key_a, key_b), peft_name=peft_name, groups=groups, dora=dora
    )


def _unwrap(path: str, peft: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> tuple[str, bool]:
    """The name of the module or bare parameter with its factors at `path`, and whether it is a parameter.

    PEFT wraps a module once for each of its adapted parameters, in the order of their registration.
    """
    plain = re.sub(rf"(\.{WRAPPER})+$", "", f".{path}").removeprefix(".")
    depth = path.count(WRAPPER) - plain.count(WRAPPER)
    entries, holder = peft.get("target_parameters") or [], modules.get(plain)
    leaves = sorted({entry.rpartition(".")[2] for entry in entries})
    adapted = [leaf for leaf in leaves if matches(entries, full_name(plain, leaf))]
    if len(adapted) > 1:
        known = REGISTERED if holder is None else tuple(holder._parameters)
        if not {*adapted} <= {*known}:
            raise AdapterError(
                f"'{plain}' has {len(adapted)} adapted parameters, {', '.join(adapted)}, whose tensors only its model"
                f" tells apart: name its base with --base_model"
            )
        adapted.sort(key=known.index)
    return (full_name(plain, adapted[-1 - depth]), True) if depth < len(adapted) else (plain, False)


def _entry_rank(name: str, rows: int, files: AdapterFiles) -> int:
    """The rank of one entry of a stack: A has the rank times the number of entries as rows."""
    if files.record and name in files.record.settings:
        return files.record.settings[name][0]
    ranks = possible_ranks(files.peft, name)
    fitting = [int(r) for r in ranks if int(r) > 0 and rows % int(r) == 0]
    if len(fitting) != 1:
        raise AdapterError(
            f"'{name}': lora_A has {rows} rows, and {CONFIG} gives it the rank {' or '.join(map(str, ranks))}:"
            f" how many entries the stack has cannot be told"
        )
    return fitting[0]


def _scales(layers: list[Factors], peft: Mapping[str, Any], chosen: Mapping[str, float]) -> dict[str, float]:
    """s of every layer, by name, from PEFT's patterns."""
    ranks = {layer.name: layer.r for layer in layers}
    alphas = find_alphas(peft, {layer.name: layer.peft_name for layer in layers}, ranks, chosen)
    rslora = bool(peft.get("use_rslora"))
    return {name: alphas[name] / (math.sqrt(rank) if rslora else rank) for name, rank in ranks.items()}
