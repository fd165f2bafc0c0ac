"""The paper's formula for trained parameters with a run's numbers, extended to the shapes of its layers.

arXiv 2106.09685, section 4.2: |Theta| = 2 L d_model r for each kind of square matrix adapted in each of L layers. For a
matrix (m, k) it is L (k + m) r. Matrices of one kind differ only in the number of their block.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import AdaptedLayer
from lora_lightning.lora.report import InjectionReport, without_numbers


@dataclass
class Term:
    """One kind of matrix, in L layers."""

    name: str
    """Its modules' name, with `*` for a number."""
    parts: int
    """Matrices in one module: parts of a fused projection, else 1."""
    inputs: int
    outputs: int
    """Of one matrix."""
    r: int
    is_matrix: bool
    """Whether A is (r, inputs) and B (outputs, r)."""
    count: int = 0
    """L."""
    factors: int = 0
    """Parameters of all A and B."""
    more: int = 0
    """Further parameters that train there: DoRA's magnitudes, B's bias."""

    @property
    def is_square(self) -> bool:
        """Whether the paper's formula is exact for it."""
        return self.is_matrix and self.inputs == self.outputs

    @property
    def formula(self) -> str:
        """The formula with the numbers in it."""
        parts = f"{self.parts} x " if self.parts > 1 else ""
        if self.is_square:
            return f"2 L d r = {parts}2 x {self.count} x {self.inputs:,} x {self.r}"
        if self.is_matrix:
            return f"L (k + m) r = {parts}{self.count} x ({self.inputs:,} + {self.outputs:,}) x {self.r}"
        return f"as their shapes say, r = {self.r}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "is_square": self.is_square, "formula": self.formula}


def terms_of(model: nn.Module, report: InjectionReport) -> list[Term]:
    """A term for each kind of matrix, in the order of the injection table."""
    layers = {layer.lora_name(name): layer for name, layer in adapted_layers(model)}
    terms: dict[tuple[Any, ...], Term] = {}
    for row in report.modules:
        layer, name = layers[row.module], without_numbers(row.module)
        more = row.parameters - layer.lora_A.numel() - layer.lora_B.numel()
        for parts, inputs, outputs, is_matrix in _matrices(layer):
            kind = (name, parts, inputs, outputs, row.r, is_matrix)
            term = terms.setdefault(kind, Term(*kind))
            term.count += 1
            term.factors += parts * (inputs + outputs) * row.r if is_matrix else row.parameters - more
            term.more += more
            more = 0  # counted once for the module
    return list(terms.values())


def _matrices(layer: AdaptedLayer) -> list[tuple[int, int, int, bool]]:
    """(how many, inputs, outputs, whether plain matrices) of what a layer adapts."""
    A, B, settings = layer.lora_A, layer.lora_B, layer.lora_settings
    if settings.slices is not None:
        rows = settings.slices.taken_rows
        return [(rows.count(size), A.shape[1], size, True) for size in dict.fromkeys(rows)]
    is_matrix = A.dim() == B.dim() == 2 and A.shape[0] == settings.r == B.shape[1]
    return [(1, A.shape[1] if is_matrix else A[0].numel(), B.shape[0], is_matrix)]
