"""A batch whose rows name their adapters: which entries of the tensors that layers see belong to which row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.grouped import entries_of

if TYPE_CHECKING:
    from lora_lightning.lora.layers.rows import AttentionRows


@dataclass
class Batch:
    """Which adapter each row has, and what is known of the tensors that the model passes on."""

    names: Sequence[str | None]
    repeats: int
    lengths: set[int] = field(default_factory=set)
    """Second dimensions of the model's inputs, by which rows and positions flattened into one are known."""
    found: dict[tuple[int, int, bool, torch.device], dict[str, Tensor]] = field(default_factory=dict)

    @property
    def counts(self) -> set[int]:
        """How many rows a tensor may have."""
        return {len(self.names), len(self.names) * self.repeats}

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the model: note the lengths of its inputs."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 1]
        self.lengths = {t.shape[1] for t in tensors if t.shape[0] in self.counts}

    def count_of(self, layer: str, x: Tensor, dim: int) -> int:
        """How many rows the entries of x along `dim` belong to.

        Raises:
            LoRAError: it cannot be known.
        """
        size = x.shape[dim]
        if size in self.counts:
            return size
        for count in sorted(self.counts):
            if x.dim() == 2 and any(size == count * length for length in self.lengths):
                return count
        known = " or ".join(f"{count}" for count in sorted(self.counts))
        raise LoRAError(
            f"rows: '{layer}' sees {tuple(x.shape)}, and which of its {size} entries belong to which row cannot be"
            f" known: expected {known} rows in dimension {dim}. Name an adapter for every row of the batch, say"
            f" repeats= where beams or returned sequences multiply it, or activate one adapter at a time"
        )

    def entries(self, size: int, count: int, device: torch.device, *, inner: bool = False) -> dict[str, Tensor]:
        """The entries of each adapter."""
        key = (size, count, inner, device)
        if key not in self.found:
            names = [name for name in self.names for _ in range(count // len(self.names))]
            self.found[key] = {
                name: entries_of([i for i, n in enumerate(names) if n == name], size, count, inner=inner).to(device)
                for name in dict.fromkeys(names)
                if name is not None
            }
        return self.found[key]


@dataclass
class LayerRows:
    """What a layer needs to know: the batch, its own name, and the adapted layers beside it, by adapter."""

    name: str
    batch: Batch
    layers: dict[str, Any] = field(default_factory=dict)
    dim: int = 0
    host: AttentionRows | None = None
    """The attention whose `out_proj` this is."""

    def entries(self, x: Tensor, count: int | None = None) -> list[tuple[Tensor, Any]]:
        """The entries of each adapter that has a layer here."""
        if self.host is not None:
            count = self.host.lora_count
        known = self.batch.count_of(self.name, x, self.dim) if count is None else count
        found = self.batch.entries(x.shape[self.dim], known, x.device, inner=self.host is not None)
        return [(entries, self.layers[name]) for name, entries in found.items() if name in self.layers]
