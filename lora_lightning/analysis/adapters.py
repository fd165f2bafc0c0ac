"""The factors of every adapted layer, read from an adapter's files by PEFT's keys, without its model.

What only a model could tell is refused: of several adapted parameters of one module, which is which (but for the
stacks of transformers' experts), and the three weights of an attention with `kdim` or `vdim`.
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
    matches,
    peft_selects,
    refuse_other_rank,
)
from lora_lightning.lora.formats.peft.keys import A_ENDS, PREFIX, WRAPPER, canonical_keys
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.frozen.spectrum import Pair, matrix_pair
from lora_lightning.lora.layers.functional import stack_factors

OUT = f".{WRAPPER}.out_proj"
REGISTERED = ("gate_up_proj", "down_proj")
"""The order in which transformers' experts register their stacks."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One adapted layer: its update is `s B A`, or a stack of such products."""

    name: str
    """In the backbone: a module, or a bare parameter."""
    kind: str
    r: int
    """As its kind counts it: of each expert, of all groups of a convolution."""
    scale: float
    """s."""
    pairs: list[Pair]
    """A (r, k) and B (m, r): one pair, or one for each entry of a stack. A convolution's k are its inputs times its
    kernel; an embedding's are the tokens."""
    keys: tuple[str, str] = ("", "")
    """Of A and B in the file."""
    peft_name: str = ""
    """By which PEFT looks up its rank: two projections of an attention share it."""
    groups: int = 1
    """Of a convolution whose B has them."""
    dora: bool = False
    """Whether magnitudes rescale `W0 + s B A`; what is told here is told of `s B A`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k) of one entry."""
        A, B = self.pairs[0]
        return B.shape[0], A.shape[1]

    @property
    def parts(self) -> list[Pair]:
        """What keeps a rank of its own, the same for all: the entries of a stack, the groups of a convolution."""
        if self.groups == 1:
            return self.pairs
        A, B = self.pairs[0]
        rows = zip(A.chunk(self.groups), B.chunk(self.groups), strict=True)
        return [(a, b.chunk(self.groups, dim=1)[g]) for g, (a, b) in enumerate(rows)]

    @property
    def parameters(self) -> int:
        """Of A and B."""
        return sum(A.numel() + B.numel() // self.groups for A, B in self.pairs)

    def cost(self, rank: int) -> int:
        """Parameters at another rank."""
        return self.parameters // self.r * rank


@dataclass
class _Found:
    """One layer's tensors before anything is known of their scale."""

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
    """An adapter's files with the factors in them."""

    label: str
    """What tables and plots call it."""
    source: str
    """Where it lies."""
    factors: list[Factors]
    files: AdapterFiles
    tensors: dict[str, Tensor]
    """All of the file's, by PEFT's own keys."""


def read_factors(
    files: AdapterFiles, alphas: Mapping[str, float] | None = None, modules: Mapping[str, nn.Module] | None = None
) -> tuple[list[Factors], dict[str, Tensor]]:
    """Every layer's factors in the order of the file's names, and all tensors by PEFT's own keys.

    Args:
        alphas: as in `load_adapter`.
        modules: of the plain model, where it is at hand: they say in which order parameters were registered.

    Raises:
        AdapterError: keys that are not PEFT's, an A without a B, shapes or ranks that do not go together, no layer.
    """
    tensors = canonical_keys(files.tensors)
    if strangers := [key for key in tensors if not key.startswith(PREFIX)]:
        raise AdapterError(f"{files.directory}: adapter keys must start with '{PREFIX}', got {first_few(strangers)}")
    matched = [_find_layer(key, tensors, files, modules or {}) for key in tensors if key.endswith(A_ENDS)]
    if files.record:
        # A projection that only fills PEFT's form is not in the record.
        matched = [layer for layer in matched if layer.name in files.record.settings]
    if not matched:
        raise AdapterError(f"{files.directory / WEIGHTS} has no A and B: nothing to analyse")
    scales = _scales(matched, files, alphas or {})
    magnitudes = bool(files.peft.get("use_dora"))
    layers = [_factors(layer, scales[layer.name], dora=magnitudes) for layer in matched]
    return sorted(layers, key=lambda layer: natural_key(layer.name)), tensors


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Orders `layer.2` before `layer.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _find_layer(
    key_a: str, tensors: Mapping[str, Tensor], files: AdapterFiles, modules: Mapping[str, nn.Module]
) -> _Found:
    end = next(end for end in A_ENDS if key_a.endswith(end))
    key_b = key_a.removesuffix(end) + end.replace("_A", "_B")
    path, A, B = key_a.removeprefix(PREFIX).removesuffix(end), tensors[key_a], tensors.get(key_b)
    if B is None:
        raise AdapterError(f"{files.directory / WEIGHTS} has '{key_a}' and no '{key_b}': it is torn")
    layer = _Found(path, "Linear", (key_a, key_b), A, B, path)
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
    layer: _Found,
    path: str,
    tensors: Mapping[str, Tensor],
    files: AdapterFiles,
    modules: Mapping[str, nn.Module],
) -> None:
    """PEFT's wrappers out of the name: those of an attention and of bare parameters."""
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
    names = _in_order(plain, [leaf for leaf in leaves if _adapts(files, f"{plain}.{leaf}")], modules)
    if depth >= len(names):
        layer.name = layer.peft_name = plain
        return
    layer.kind, layer.name = "Parameter", f"{plain}.{names[len(names) - 1 - depth]}".removeprefix(".")
    layer.peft_name = layer.name
    layer.rank = _entry_rank(layer, files)
    layer.count = layer.A.shape[0] // layer.rank


def _in_order(plain: str, leaves: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Adapted parameters of one module as they were registered, by which PEFT wraps them; its config has any order."""
    holder = modules.get(plain)
    known = REGISTERED if holder is None else tuple(holder._parameters)
    if len(leaves) > 1 and not {*leaves} <= {*known}:
        raise AdapterError(
            f"'{plain}' has {len(leaves)} adapted parameters, {', '.join(sorted(leaves))}, whose tensors only its model"
            f" tells apart: name its base with --base_model"
        )
    return sorted(leaves, key=known.index) if len(leaves) > 1 else leaves


def _adapts(files: AdapterFiles, name: str) -> bool:
    return peft_selects(files.peft.get("target_parameters") or [], name.removeprefix("."))


def _entry_rank(layer: _Found, files: AdapterFiles) -> int:
    """The rank of one entry of a stack, of which the tensors hold the rank times the number of entries."""
    if files.record and layer.name in files.record.settings:
        return files.record.settings[layer.name][0]
    ranks = set(matches(files.peft.get("rank_pattern"), layer.name).values()) or {files.peft.get("r", 8)}
    fitting = sorted(int(r) for r in ranks if int(r) > 0 and layer.A.shape[0] % int(r) == 0)
    if len(fitting) != 1:
        raise AdapterError(
            f"'{layer.name}': lora_A has {layer.A.shape[0]} rows, and {CONFIG} gives it the rank"
            f" {' or '.join(map(str, sorted(ranks)))}: how many entries the stack has cannot be told"
        )
    return fitting[0]


def _scales(matched: list[_Found], files: AdapterFiles, alphas: Mapping[str, float]) -> dict[str, float]:
    """s of every layer, by name: from our record, or from PEFT's patterns."""
    if files.record:
        return {layer.name: files.record.settings[layer.name][2] for layer in matched}
    for layer in matched:
        refuse_other_rank(files.peft, layer.name, layer.peft_name, layer.rank)
    ranks = {layer.name: layer.rank for layer in matched}
    alpha_of = find_alphas(files.peft, {layer.name: layer.peft_name for layer in matched}, ranks, alphas)
    rslora = bool(files.peft.get("use_rslora"))
    return {name: alpha_of[name] / (math.sqrt(rank) if rslora else rank) for name, rank in ranks.items()}


def _pairs(layer: _Found) -> list[Pair]:
    if layer.count == 1:
        return [matrix_pair(layer.A, layer.B)]
    return list(zip(*stack_factors(layer.A, layer.B, layer.count), strict=True))


def _factors(layer: _Found, scale: float, *, dora: bool) -> Factors:
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
