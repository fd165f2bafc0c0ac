"""Which classes a classifier mixes up: counts by true and predicted class, and its most confident mistakes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lightning.reports.table import Table

MISTAKES = 20
"""Mistakes that are stored, the most confident first."""
MOST_CLASSES = 1000
"""With more classes nothing is counted: the matrix grows with the square."""
MOST_SHOWN = 20
"""Classes up to which the whole matrix is shown; with more, only the pairs that are mixed up most."""
CHARACTERS, PIXELS = 600, 96
"""At most so many characters of a text, and pixels of a picture's longer side."""


class ClassCounts:
    """Counts (C, C) at [true, predicted], and mistakes, over the batches of one evaluation."""

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.long)
        self.mistakes: list[dict[str, Any]] = []

    def add(self, logits: Tensor, labels: Tensor, batch: Mapping[str, Any], tokenizer: Any = None) -> None:
        """Count one batch.

        Args:
            logits: (n, C).
            labels: (n,); those that are no class are ignored.
            batch: has the texts or the pictures that mistakes show.
            tokenizer: decodes its `input_ids`.
        """
        classes = len(self.counts)
        labels = labels.cpu()
        rows = ((labels >= 0) & (labels < classes)).nonzero().flatten()
        confidence, predicted = logits.float().softmax(-1).max(-1)
        confidence, predicted = confidence.cpu(), predicted.cpu()
        pairs = labels[rows] * classes + predicted[rows]
        self.counts += torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        wrong = rows[(predicted != labels)[rows]]
        least = self.mistakes[-1]["confidence"] if len(self.mistakes) == MISTAKES else -1.0
        wrong = wrong[confidence[wrong] > least]
        for i in wrong[confidence[wrong].argsort(descending=True)][:MISTAKES].tolist():
            row = {"true": int(labels[i]), "predicted": int(predicted[i]), "confidence": float(confidence[i])}
            self._keep([{**row, **_for_page(input_of(batch, i, tokenizer))}])

    def join(self, others: Iterable[ClassCounts]) -> ClassCounts:
        """Add the counts of other processes."""
        for other in others:
            self.counts += other.counts
            self._keep(other.mistakes)
        return self

    def _keep(self, mistakes: list[dict[str, Any]]) -> None:
        ranked = sorted([*self.mistakes, *mistakes], key=lambda mistake: -mistake["confidence"])
        self.mistakes = ranked[:MISTAKES]

    def to_dict(self, names: list[str] | None = None) -> dict[str, Any]:
        """Plain data, for a JSON file of the run.

        Args:
            names: of the classes in order; their numbers by default.
        """
        labels = names if names is not None and len(names) == len(self.counts) else range(len(self.counts))
        return {"labels": list(map(str, labels)), "counts": self.counts.tolist(), "mistakes": self.mistakes}


def input_of(batch: Mapping[str, Any], row: int, tokenizer: Any = None) -> Any:
    """The text of one row of a batch, or its picture as a PIL image; None where it has neither."""
    ids, pixels = batch.get("input_ids"), batch.get("pixel_values")
    if tokenizer is not None and isinstance(ids, Tensor) and row < len(ids):
        text = " ".join(tokenizer.decode(ids[row], skip_special_tokens=True).split())
        return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ..."
    if isinstance(pixels, Tensor) and row < len(pixels) and pixels.dim() == 4 and pixels.shape[1] in (1, 3):
        from PIL import Image  # data with pictures need it too

        image = pixels[row].detach().float().cpu()
        low, high = image.min(), image.max()
        values = ((image - low) / (high - low).clamp(min=1e-9) * 255).byte().expand(3, -1, -1).permute(1, 2, 0)
        return Image.fromarray(values.numpy())
    return None


def _for_page(shown: Any) -> dict[str, str]:
    """What a page shows of an input: its text, or its picture as the `data:` URL of a small PNG."""
    if shown is None or isinstance(shown, str):
        return {} if shown is None else {"text": shown}
    shown.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    return {"picture": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}


def class_table(confusion: Mapping[str, Any]) -> Table:
    """Precision, recall, F1 and support of each class, and their plain (macro) means."""
    counts = torch.tensor(confusion["counts"], dtype=torch.float64)
    hits, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    precision, recall = hits / predicted.clamp(min=1), hits / support.clamp(min=1)
    f1 = 2 * hits / (support + predicted).clamp(min=1)
    rows = [
        [name, *(f"{float(value[i]):.3f}" for value in (precision, recall, f1)), f"{int(support[i]):,}"]
        for i, name in enumerate(confusion["labels"])
    ]
    # As in torchmetrics, a class without examples and predictions is left out of the means.
    seen = (support + predicted) > 0
    means = [f"{float(value[seen].mean()) if seen.any() else 0.0:.3f}" for value in (precision, recall, f1)]
    rows.append(["mean over classes (macro)", *means, f"{int(support.sum()):,}"])
    return Table(header=["class", "precision", "recall", "F1", "support"], rows=rows)


def confusions(confusion: Mapping[str, Any]) -> list[tuple[str, list[tuple[int, int, str]]]]:
    """The matrix's rows: true class, and for each predicted one the count, its shade from 0 to 9, and a tooltip."""
    labels, rows = confusion["labels"], []
    for name, counts in zip(labels, confusion["counts"], strict=True):
        total = max(1, sum(counts))
        tips = [f"{n:,} of {total:,} {name} taken for {other}" for other, n in zip(labels, counts, strict=True)]
        rows.append((name, [(n, min(9, round(9 * n / total)), tip) for n, tip in zip(counts, tips, strict=True)]))
    return rows


def confused_pairs(confusion: Mapping[str, Any]) -> Table:
    """The pairs of classes that are mixed up most, where there are too many classes for a matrix."""
    labels = confusion["labels"]
    counts = torch.tensor(confusion["counts"]).fill_diagonal_(0)
    pairs = sorted(((int(counts[i, j]), labels[i], labels[j]) for i, j in counts.nonzero().tolist()), reverse=True)
    rows = [[true, predicted, f"{n:,}"] for n, true, predicted in pairs[:MISTAKES]]
    return Table(header=["true class", "taken for", "how often"], rows=rows, text=(0, 1))
