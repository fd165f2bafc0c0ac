"""Parts of a fused projection: which output rows are query, key and value, and which of them are adapted.

A fused layer stacks several projections into one weight: GPT-2's `c_attn` holds query, key and value in thirds,
GPT-NeoX's `query_key_value` does so head by head, Phi-3's `gate_up_proj` holds two halves. An adapter on chosen parts
has an A (r, in) and a B (rows of the part, r) for each, as in the paper, where the parts are separate matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_lightning.lora.errors import ConfigError, TargetError, did_you_mean

SliceSpec = list[str] | dict[str, Any]
"""The user's form: the parts to adapt where the layout is known, or `{of, take}` with `sizes` and `heads`."""


@dataclass(frozen=True, kw_only=True)
class Slices:
    """The layout of a fused weight's rows, and the adapted parts.

    The rows are `heads` consecutive blocks, each of which has the rows of every part in order.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Rows of each part within one block."""
    heads: int = 1
    taken: tuple[str, ...]
    """The parts that are adapted, in the order of `names`."""

    @property
    def taken_rows(self) -> list[int]:
        """Rows of each part that is adapted."""
        return [self.heads * size for name, size in zip(self.names, self.sizes, strict=True) if name in self.taken]

    def to_spec(self) -> dict[str, Any]:
        """The full form, which needs no known layout."""
        return {"of": list(self.names), "sizes": list(self.sizes), "take": list(self.taken), "heads": self.heads}


def refuse_spec(pattern: str, spec: Any) -> None:
    """Raise a ConfigError unless `spec` is well formed."""
    what = f"slices['{pattern}']"
    take = spec
    if isinstance(spec, Mapping):
        unknown = set(spec) - {"of", "take", "sizes", "heads"}
        if unknown or "of" not in spec or "take" not in spec:
            raise ConfigError(f"{what} must hold 'of', 'take' and perhaps 'sizes' and 'heads', got {sorted(spec)}")
        of, take, sizes = spec["of"], spec["take"], spec.get("sizes")
        if isinstance(of, str) or not isinstance(of, Sequence) or len(of) < 2 or len(set(of)) < len(of):
            raise ConfigError(f"{what}: 'of' must list at least two different parts in order, got {of!r}")
        for number in (spec.get("heads", 1), *(sizes or ())):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{what}: heads and sizes must be whole numbers of at least 1, got {number!r}")
        if sizes is not None and len(sizes) != len(of):
            raise ConfigError(f"{what}: 'sizes' must have one number for each part in {of}, got {sizes}")
        strangers = [name for name in take if name not in of]
        if strangers:
            raise ConfigError(f"{what}: there is no part '{strangers[0]}' in {of}{did_you_mean(strangers[0], of)}")
    if isinstance(take, str) or not isinstance(take, Sequence) or not take:
        raise ConfigError(f"{what} must list the parts to adapt, such as [q, v], got {take!r}")


def resolve_slices(name: str, module: nn.Module, parent: nn.Module | None, rows: int, spec: SliceSpec) -> Slices:
    """The layout and the adapted parts of one module; a TargetError where they are not known or do not add up."""
    if isinstance(spec, dict):
        names, heads = tuple(spec["of"]), int(spec.get("heads", 1))
        sizes = tuple(spec.get("sizes") or (rows // (heads * len(names)),) * len(names))
        take = list(spec["take"])
    else:
        names, sizes, heads = _known_layout(name, module, parent, rows)
        take = list(spec)
    for part in take:
        if part not in names:
            raise TargetError(f"slices: '{name}' has the parts {', '.join(names)}, got '{part}'")
    slices = Slices(names=names, sizes=sizes, heads=heads, taken=tuple(n for n in names if n in take))
    if (total := heads * sum(sizes)) != rows:
        raise TargetError(f"slices: the parts of '{name}' add up to {total} rows, but its weight has {rows}")
    return slices


Layout = tuple[tuple[str, ...], tuple[int, ...], int]


def _known_layout(name: str, module: nn.Module, parent: nn.Module | None, rows: int) -> Layout:
    """Names, sizes and heads of the parts, known by the class of the module's parent."""
    if isinstance(module, nn.MultiheadAttention):
        return ("q", "k", "v"), (module.embed_dim,) * 3, 1
    last = name.rpartition(".")[2]
    for cls in type(parent).__mro__ if parent is not None else ():
        layout = LAYOUTS.get((f"{cls.__module__.partition('.')[0]}:{cls.__name__}", last))
        if layout is not None:
            return layout(parent, rows)
    raise TargetError(
        f"slices: the layout of '{name}' is not known; write it out, such as"
        f" {{of: [q, k, v], take: [q, v]}} for thirds, with heads: N where they alternate head by head"
    )


def _qkv_thirds(parent: Any, rows: int) -> Layout:
    return ("q", "k", "v"), (rows // 3,) * 3, 1


def _gpt2(parent: Any, rows: int) -> Layout:
    """In cross-attention the query is in `q_attn`, and key and value are in `c_attn`."""
    return (("k", "v"), (rows // 2,) * 2, 1) if parent.is_cross_attention else _qkv_thirds(parent, rows)


def _by_head(parent: Any, rows: int) -> Layout:
    heads = rows // (3 * int(parent.head_dim if "head_dim" in vars(parent) else parent.head_size))
    return ("q", "k", "v"), (rows // (3 * heads),) * 3, heads


def _grouped_qkv(parent: Any, rows: int) -> Layout:
    """Phi-3: all query heads, then the fewer key heads, then the value heads."""
    query = int(parent.config.num_attention_heads) * int(parent.head_dim)
    return ("q", "k", "v"), (query, (rows - query) // 2, (rows - query) // 2), 1


def _halves(parent: Any, rows: int) -> Layout:
    return ("gate", "up"), (rows // 2,) * 2, 1


# From the forward of each class, in transformers 5.24 and timm 1.0.31.
LAYOUTS: dict[tuple[str, str], Callable[[Any, int], Layout]] = {
    ("transformers:GPT2Attention", "c_attn"): _gpt2,
    ("transformers:GPTNeoXAttention", "query_key_value"): _by_head,
    ("transformers:BloomAttention", "query_key_value"): _by_head,
    ("transformers:Phi3Attention", "qkv_proj"): _grouped_qkv,
    ("transformers:Phi3MLP", "gate_up_proj"): _halves,
    ("timm:Attention", "qkv"): _qkv_thirds,
}
