"""Entities from a sentence's tags; their precision, recall and F1 over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.losses.token_loss import IGNORED

OUTSIDE = "O"
"""The tag of words in no entity."""
PREFIXES = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S"}
"""Begin, inside, end and single of IOB2 and IOBES; BILOU calls the latter two last and unit."""


class Span(NamedTuple):
    """An entity: words `start` up to `end`, which is the first word after it."""

    kind: str
    start: int
    end: int


class Tag(NamedTuple):
    """A label's parts: `B-PER` is (B, PER), `O` is (O, "")."""

    prefix: str
    kind: str


class Tagging:
    """A scheme of labels for entities: IOB2, IOBES, BILOU, or without prefixes, where equal neighbors join.

    By default every word whose tag is not O is in an entity, as in `conlleval`, the script of the CoNLL shared tasks,
    and in seqeval: an entity begins at B and S, after E and S, after O, and where the kind changes.

    Args:
        names: the labels, in the order of their numbers.
        strict: count only well-formed entities, as seqeval's strict mode does: in IOB2 B and then I of one kind; in
            IOBES S, or B to E.

    Raises:
        LoRAError: some labels have a prefix and others have none; or `strict` without prefixes.
    """

    def __init__(self, names: Sequence[str], *, strict: bool = False) -> None:
        read = {name: _split(name) for name in names if name != OUTSIDE}
        bare = [name for name, tag in read.items() if tag is None]
        if bare and len(bare) < len(read):
            prefixed = next(name for name, tag in read.items() if tag is not None)
            raise LoRAError(
                f"label '{prefixed}' has a prefix as in IOB2 and IOBES, '{bare[0]}' has none: give all labels but"
                f" '{OUTSIDE}' one, or none; or entities: false for labels that mark no entities"
            )
        if bare and strict:
            raise LoRAError(f"strict needs labels with prefixes, such as B-{bare[0]}; got '{bare[0]}'")
        self.tags = [Tag(OUTSIDE, "") if name == OUTSIDE else read[name] or Tag("I", name) for name in names]
        self.strict = strict
        self._ends_are_marked = any(tag.prefix in "ES" for tag in self.tags)

    def spans(self, labels: Sequence[int]) -> list[Span]:
        """The entities of one sentence, in order, from its words' label numbers."""
        tags = [self.tags[label] for label in labels]
        starts = [i for i, tag in enumerate(tags) if tag.prefix != OUTSIDE and (i == 0 or _parts(tags[i - 1], tag))]
        follow = [*tags[1:], Tag(OUTSIDE, "")]
        stops = [i + 1 for i, tag in enumerate(tags) if tag.prefix != OUTSIDE and _parts(tag, follow[i])]
        spans = [Span(tags[start].kind, start, stop) for start, stop in zip(starts, stops, strict=True)]
        return [span for span in spans if self._well_formed(tags[span.start : span.end])] if self.strict else spans

    def _well_formed(self, tags: Sequence[Tag]) -> bool:
        prefixes = "".join(tag.prefix for tag in tags)
        if not self._ends_are_marked:
            return prefixes[0] == "B"
        return prefixes == "S" or (prefixes[0] == "B" and prefixes[-1] == "E")


def _split(name: str) -> Tag | None:
    prefix, dash, kind = name.partition("-")
    return Tag(PREFIXES[prefix], kind) if dash and kind and prefix in PREFIXES else None


def _parts(before: Tag, tag: Tag) -> bool:
    """Whether two neighbors are in different entities."""
    return before.prefix in "ESO" or tag.prefix in "BSO" or before.kind != tag.kind


class EntityMetric(Metric):
    """Counts of entities, summed over all batches: the micro average of seqeval and `conlleval`.

    An entity is right where kind, first and last word are.

    Args:
        names: the labels, in the order of their numbers.
        strict: count only well-formed entities; see `Tagging`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    found: Tensor
    predicted: Tensor
    actual: Tensor

    def __init__(self, names: Sequence[str], *, strict: bool = False) -> None:
        super().__init__()
        self.tagging = Tagging(names, strict=strict)
        for state in ("found", "predicted", "actual"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add sentences (n, t) of label numbers; targets of -100 are left out."""
        for guessed, true in zip(predictions.tolist(), targets.tolist(), strict=True):
            words = [i for i, label in enumerate(true) if label != IGNORED]
            guesses, truths = (set(self.tagging.spans([labels[i] for i in words])) for labels in (guessed, true))
            self.found += len(guesses & truths)
            self.predicted += len(guesses)
            self.actual += len(truths)


class EntityPrecision(EntityMetric):
    """The share of predicted entities that are right; 0 where none is predicted."""

    def compute(self) -> Tensor:
        return self.found / self.predicted.clamp(min=1)


class EntityRecall(EntityMetric):
    """The share of true entities that are predicted; 0 where there is none."""

    def compute(self) -> Tensor:
        return self.found / self.actual.clamp(min=1)


class EntityF1(EntityMetric):
    """The harmonic mean of precision and recall, `2 right / (predicted + true)`; 0 without entities."""

    def compute(self) -> Tensor:
        return 2 * self.found / (self.predicted + self.actual).clamp(min=1)
