"""A batch whose rows name their adapters: which entries of the tensors that layers see belong to which row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.bank.grouped import entries_of
from lora_lightning.lora.bank.row_mirror import WrongGuess, guesses, run_mirrored
from lora_lightning.lora.bank.row_proof import Layout, Proof, Seen, layouts, signature
from lora_lightning.lora.errors import LoRAError

if TYPE_CHECKING:
    from lora_lightning.lora.bank.row_layers import AttentionRows


@dataclass
class Batch:
    """Which adapter each row has, and what is known of the tensors that the model passes on."""

    names: Sequence[str | None]
    repeats: int
    model: nn.Module
    proofs: dict[Any, Proof] = field(default_factory=dict)
    """By the module that was called, and how."""
    proof: Proof = field(default_factory=Proof)
    """Of the call that runs now."""
    proving: Proof | None = None
    """While the proof is made: layers then compute as the plain base and only tell what they see."""
    running: list[nn.Module] = field(default_factory=list)
    """The modules that are being called, outermost first."""
    called: dict[str, int] = field(default_factory=dict)
    """How often each layer was called within the call that runs now."""
    found: dict[tuple[int, int, bool, torch.device], dict[str, Tensor]] = field(default_factory=dict)

    @property
    def counts(self) -> set[int]:
        """How many rows a tensor may have."""
        return {len(self.names), len(self.names) * self.repeats}

    @property
    def is_one(self) -> bool:
        """Whether all rows have the same adapter: then it does not matter which is which."""
        return len(set(self.names)) == 1

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of whatever leads to a layer: the outermost call is proven where it is new."""
        if self.proving is not None or self.is_one:
            return
        self.running.append(module)
        if len(self.running) == 1:
            self.called.clear()
            key = (module, signature(args, kwargs))
            self.proof = self.proofs.get(key) or self._prove(module, args, kwargs)
            self.proofs[key] = self.proof

    def leave(self, module: nn.Module, *_: Any) -> None:
        """The hook that ends the call, also where it failed."""
        if self.proving is None and self.running and self.running[-1] is module:
            self.running.pop()

    def _prove(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proof:
        failed: Exception | None = None
        for guess in guesses(args, kwargs, self.counts):
            if module is not self.model and not _plainly_rows(args, kwargs, self.counts):
                break
            self.proving = Proof(guess[1])
            try:
                self.proving.picks = run_mirrored(module, args, kwargs, guess)
                return self.proving
            except LoRAError:
                raise
            except Exception as error:
                failed = error if not isinstance(error, WrongGuess) else failed
            finally:
                self.proving = None
                self.called.clear()
        if failed is not None:
            raise LoRAError(
                f"rows: to see where the rows are, {type(module).__name__} is run on its inputs and their mirror"
                f" image, which failed ({type(failed).__name__}: {failed}): activate one adapter at a time"
            ) from failed
        return Proof()

    def tell(self, layer: str, x: Tensor, dims: Collection[int], out: Tensor | None = None) -> None:
        """While the proof is made: what `layer` sees, and gives where its rows must be in the same place."""
        assert self.proving is not None
        found = layouts(x, self.proving.count, dims)
        if out is not None:
            given = layouts(out, self.proving.count, [d for d in found if d < out.dim() and out.shape[d] == x.shape[d]])
            found = {d: both for d in given if (both := [way for way in found[d] if way in given[d]])}
        self.proving.calls[self._call(layer)] = Seen(x.shape, found)

    def layout(self, layer: str, x: Tensor) -> tuple[Layout, int]:
        """Where the rows of x are, and how many they are.

        Raises:
            LoRAError: it cannot be known.
        """
        where = self.proof.layout(self._call(layer), x)
        if where is not None:
            return where, self.proof.count
        known = " or ".join(f"{count}" for count in sorted(self.counts))
        raise LoRAError(
            f"rows: '{layer}' sees {tuple(x.shape)}, and which of its entries belong to which row cannot be known:"
            f" expected one dimension of it to be that of {known} rows, and the model's inputs to have them. Name an"
            f" adapter for every row of the batch, say repeats= where beams or returned sequences multiply it, or"
            f" activate one adapter at a time"
        )

    def _call(self, layer: str) -> tuple[str, int]:
        self.called[layer] = self.called.get(layer, 0) + 1
        return layer, self.called[layer]

    def entries(self, size: int, count: int, device: torch.device, *, inner: bool = False) -> dict[str, Tensor]:
        """The entries of each adapter."""
        if self.is_one:
            return {name: torch.arange(size, device=device) for name in self.names if name is not None}
        key = (size, count, inner, device)
        if key not in self.found:
            names = [name for name in self.names for _ in range(count // len(self.names))]
            self.found[key] = {
                name: entries_of([i for i, n in enumerate(names) if n == name], size, count, inner=inner).to(device)
                for name in dict.fromkeys(names)
                if name is not None
            }
        return self.found[key]


def _plainly_rows(args: tuple[Any, ...], kwargs: dict[str, Any], counts: Collection[int]) -> bool:
    """Whether what a part of the model is given by itself, as `generate` calls an encoder, has rows first for sure."""
    floats = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    return all(t.dim() > 2 and t.shape[0] in counts and t.shape[1] not in counts for t in floats)


@dataclass
class LayerRows:
    """What a layer needs to know: the batch, its own name, and the adapted layers beside it, by adapter."""

    name: str
    batch: Batch
    layers: dict[str, Any] = field(default_factory=dict)
    host: AttentionRows | None = None
    """The attention whose `out_proj` this is: it sees (length, rows) flattened."""

    def entries(self, x: Tensor) -> tuple[int, list[tuple[Tensor, Any]]]:
        """The dimension of the rows, and the entries of each adapter that has a layer here."""
        batch, dim, inner, count = self.batch, 0, True, 1
        if self.host is not None:
            count = self.host.lora_count
        elif not batch.is_one:
            (dim, inner), count = batch.layout(self.name, x)
        return dim, self.grouped(x, dim, count, inner=inner)

    def grouped(self, x: Tensor, dim: int, count: int, *, inner: bool) -> list[tuple[Tensor, Any]]:
        """The entries of x along `dim`, by adapter, and the layers."""
        found = self.batch.entries(x.shape[dim], count, x.device, inner=inner)
        return [(entries, self.layers[name]) for name, entries in found.items() if name in self.layers]
