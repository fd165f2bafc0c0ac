"""One label for each word, such as named entities and parts of speech; entities and their precision, recall and F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import StepOutput, Task, labels_of, logits_like, refuse_few, refuse_smoothing
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED


class TokenClassification(Task):
    """Cross-entropy over labelled tokens; accuracy over words, and precision, recall and F1 of whole entities.

    Args:
        label_names: the labels, in the order of their numbers: IOB2 (`B-PER`, `I-PER`, `O`), IOBES, BILOU, or kinds
            alone (`PER`, `O`). The data's by default.
        entities: whether the labels mark entities. If not, as for parts of speech, accuracy is the only metric.
        strict: count only well-formed entities, as in seqeval's strict mode; by default as in `conlleval`.
        label_smoothing: share of the target spread over all labels.
    """

    monitor = "val/f1"
    monitor_mode = "max"
    peft_task_type = "TOKEN_CLS"
    output_is = "label"
    not_inputs = ("labels", "word_ids", "words")

    def __init__(
        self, label_names: list[str], entities: bool = True, strict: bool = False, label_smoothing: float = 0.0
    ) -> None:
        count = None if label_names is None else len(label_names)
        refuse_few(count, "label_names", "token classification needs at least 2 labels")
        refuse_smoothing(label_smoothing)
        accuracy = MulticlassAccuracy(len(label_names), average="micro", ignore_index=IGNORED)
        metrics: dict[str, Metric | MetricCollection] = {"accuracy": accuracy}
        if entities:
            metrics["precision"] = EntityPrecision(label_names, strict=strict)
            metrics["recall"] = EntityRecall(label_names, strict=strict)
            metrics["f1"] = EntityF1(label_names, strict=strict)
        super().__init__(MetricCollection(metrics))
        self.label_names, self.outputs = list(label_names), len(label_names)
        self.tagging = Tagging(label_names, strict=strict) if entities else None
        self.label_smoothing = label_smoothing
        if not entities:
            self.monitor = "val/accuracy"

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` has the backbone's keyword arguments and `labels` (n, t), -100 where there is none.

        With `word_ids` (n, t), which has each word's number at its first token and -1 elsewhere, metrics count words,
        though all tokens may be labeled. Without it they count labeled tokens.
        """
        labels = labels_of(batch)
        logits = self._logits(backbone, self.inputs(backbone, batch), labels.shape)
        labelled = labels != IGNORED
        count = int(labelled.sum())
        total = F.cross_entropy(
            logits[labelled], labels[labelled], reduction="sum", label_smoothing=self.label_smoothing
        )
        words = labels.masked_fill(batch["word_ids"] < 0, IGNORED) if "word_ids" in batch else labels
        return StepOutput(loss=total / max(count, 1), weight=count, predictions=logits.argmax(-1), targets=words)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """For each text its words' `labels`, and its `entities` with kind, first word and the first word after it.

        A word that the model did not see, because `max_length` cut it off, has the label None and is in no entity.
        """
        inputs = self.inputs(backbone, batch)
        if "word_ids" not in batch:
            raise LoRAError(f"the batch has no 'word_ids', which say where each word begins; only {', '.join(inputs)}")
        word_ids = batch["word_ids"]
        best = self._logits(backbone, inputs, word_ids.shape).argmax(-1)
        words: list[list[str] | None] = list(batch.get("words") or [None] * len(word_ids))
        rows = [
            self._row(labels, numbers, sentence)
            for labels, numbers, sentence in zip(best.tolist(), word_ids.tolist(), words, strict=True)
        ]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def _row(self, labels: list[int], word_ids: list[int], words: list[str] | None) -> dict[str, Any]:
        seen = {number: label for number, label in zip(word_ids, labels, strict=True) if number >= 0}
        count = len(words) if words is not None else 1 + max(seen, default=-1)
        row: dict[str, Any] = {} if words is None else {"words": words}
        row["labels"] = [self.label_names[seen[i]] if i in seen else None for i in range(count)]
        if self.tagging is not None:
            order = sorted(seen)
            row["entities"] = [
                {"kind": span.kind, "start": order[span.start], "end": order[span.end - 1] + 1}
                | ({} if words is None else {"text": " ".join(words[order[span.start] : order[span.end - 1] + 1])})
                for span in self.tagging.spans([seen[i] for i in order])
            ]
        return row

    def _logits(self, backbone: nn.Module, inputs: dict[str, Any], shape: torch.Size) -> Tensor:
        count = len(self.label_names)
        return logits_like(backbone(**inputs), (*shape, count), count, "one for each token and label")


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
