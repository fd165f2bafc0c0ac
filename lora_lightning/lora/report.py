"""Reports: what an injection adapted, as data and as a table, and what rounding did to a merge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lora_lightning.lora.errors import first_few, warn
from lora_lightning.lora.frozen.dtype import dtype_name
from lora_lightning.lora.frozen.tensors import get_module, named_modules
from lora_lightning.lora.layers import SavedCopy, TokenRows, TrainedBias

OUTPUT_HEAD = "the output head"
"""Why `all-linear` leaves out a head."""
STACK = "a stack of matrices, as fused experts are: name it in target_parameters"
"""Why `all-linear` leaves out a bare parameter."""

LEAST_KEPT = 0.9
"""Where rounding keeps a smaller share of an update, a warning says so."""


@dataclass(frozen=True, kw_only=True)
class AdaptedModule:
    """One row of the injection table."""

    module: str
    kind: str
    """The kind of layer, with the adapted parts in brackets where it is fused."""
    r: int
    alpha: float
    dropout: float
    parameters: int
    """Trainable parameters of this module: A, B, DoRA's magnitudes, B's bias."""
    why: str
    """The entry of the config that selected it."""


@dataclass(frozen=True, kw_only=True)
class InjectionReport:
    """What trains and what does not."""

    modules: list[AdaptedModule]
    saved: dict[str, int]
    """`modules_to_save` by full name, with the parameters of each copy."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Embeddings with rows that train in full, with the parameters of those rows."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Linear layers and stacks of matrices that `all-linear` left out, with the reason."""
    biases: int = 0
    """Entries of biases that train, in number."""
    trainable: int
    """Parameters that train, in number."""
    frozen: int
    """Parameters that do not."""

    @classmethod
    def of_model(cls, model: nn.Module, rows: list[AdaptedModule], skipped: dict[str, str]) -> InjectionReport:
        """Count everything in one walk: over hundreds of layers, walks through nn.Module's generators are slow."""
        named = list(named_modules(model))
        parameters = {id(p): p for _, module in named for p in module._parameters.values() if p is not None}
        copies = {n: m.lora_copy for n, m in named if isinstance(m, SavedCopy)}
        biases = {m.lora_trained_bias for _, m in named if isinstance(m, TrainedBias)}
        trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
        return cls(
            modules=rows,
            saved={name: sum(p.numel() for p in copy.parameters()) for name, copy in copies.items()},
            tokens={name: module.lora_tokens.numel() for name, module in named if isinstance(module, TokenRows)},
            skipped=skipped,
            biases=sum(bias.numel() for bias in biases),
            trainable=trainable,
            frozen=sum(p.numel() for p in parameters.values()) - trainable,
        )

    @property
    def total(self) -> int:
        """All parameters, adapters included."""
        return self.trainable + self.frozen

    @property
    def share(self) -> float:
        """trainable / total, between 0 and 1."""
        return self.trainable / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and loggers."""
        return {**asdict(self), "total": self.total, "share": self.share}

    def table(self) -> list[tuple[str, ...]]:
        """`HEADER` and a row for layers that differ in block numbers only (`*`); no column of dropouts if all are 0."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row in self.modules:
            key = (without_numbers(row.module), row.kind, row.r, row.alpha, row.dropout)
            groups.setdefault(key, []).append(row.parameters)
        lines: list[tuple[str, ...]] = [
            (name, f"{len(sizes)}", kind, f"{r}", f"{alpha:g}", f"{dropout:g}", f"{sum(sizes):,}")
            for (name, kind, r, alpha, dropout), sizes in groups.items()
        ]
        lines += [(name, "1", "in full", "", "", "", f"{parameters:,}") for name, parameters in self.saved.items()]
        lines += [(name, "1", "rows in full", "", "", "", f"{n:,}") for name, n in self.tokens.items()]
        if self.biases:
            lines.append(("biases", "", "in full", "", "", "", f"{self.biases:,}"))
        at = self.HEADER.index("dropout")
        if any(line[at] not in ("", "0") for line in lines):
            return [self.HEADER, *lines]
        return [(*row[:at], *row[at + 1 :]) for row in (self.HEADER, *lines)]

    def exclusions(self) -> list[str]:
        """A line for each kind of layer that `all-linear` left out, with the reason; none for the output head."""
        groups = Counter((without_numbers(name), reason) for name, reason in self.skipped.items())
        return [
            f"left out {name} ({count}): {reason}" for (name, reason), count in groups.items() if reason != OUTPUT_HEAD
        ]

    HEADER = ("module", "count", "kind", "r", "alpha", "dropout", "parameters")

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"trainable {self.trainable:,} of {self.total:,} ({self.share:.2%})")
        return "\n".join([*lines, *self.exclusions()])


def warn_of_stacks(model: nn.Module, skipped: dict[str, str]) -> None:
    """Warn of the experts that stay frozen under `all-linear`, with their share of the parameters."""
    stacks = [name for name, reason in skipped.items() if reason == STACK]
    if not stacks:
        return
    places = [name.rpartition(".") for name in stacks]
    entries = sum(getattr(get_module(model, module), key).numel() for module, _, key in places)
    share = entries / sum(p.numel() for p in model.parameters())
    kinds = list(dict.fromkeys(f"'{without_numbers(name)}'" for name in stacks))
    ends = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in stacks))
    warn(
        f"all-linear adapts layers; {first_few(kinds)}, stacks of matrices as fused experts are, stay frozen,"
        f" {share:.0%} of the parameters; to adapt them too: target_parameters: [{ends}]"
    )


def without_numbers(name: str) -> str:
    """A module's name with `*` for each number, such as that of its block."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


@dataclass(frozen=True)
class MergeReport:
    """What rounding to W0's dtype did to each layer's update."""

    kept: dict[str, float] = field(default_factory=dict)
    """By module, 1 - ||W - W0 - s B A||_F / ||s B A||_F for the merged weight W: the share of the update that rounding
    kept. 1 is all of it; at 0 the error is as large as the update."""
    untied: list[str] = field(default_factory=list)
    """Modules that shared a weight with another module and no longer do."""
    dequantized: list[str] = field(default_factory=list)
    """Modules that were quantized and are plain `nn.Linear` now."""


def count_low(kept: Mapping[str, float]) -> int:
    """The number of layers in which rounding erased more than a tenth of the update."""
    return sum(share < LEAST_KEPT for share in kept.values())


def rounding_warning(kept: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """A warning that names the worst layers where rounding to `dtype` erased more than a tenth of the update, or None.

    Args:
        kept: by module, the share of the update that rounding kept.
    """
    low = count_low(kept)
    if not low:
        return None
    worst = sorted((share, name) for name, share in kept.items())[: min(3, low)]
    return (
        f"rounding to {dtype_name(dtype)} kept less than {LEAST_KEPT:.0%} of the update in {low} of {len(kept)} layers,"
        f" least in {', '.join(f'{name} ({share:.0%})' for share, name in worst)}: merge into float32"
        f" (dtype=torch.float32, --dtype float32), or use the adapter, which lost nothing"
    )
