"""Entities as seqeval finds them, counted over everything seen; the loss over labelled tokens alone."""

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lora_lightning import TokenClassification
from lora_lightning.tasks.token_classification import EntityF1, EntityPrecision, EntityRecall, Span, Tagging
from tests.tasks.test_figures import IOB2, Says

IOBES = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC") for prefix in "BIES")]


def spans(tags, names=None, **kwargs):
    names = names or sorted({"O", *tags})
    return Tagging(names, **kwargs).spans([names.index(tag) for tag in tags])


@pytest.mark.parametrize(
    ("tags", "expected", "strict"),
    [
        ("O B-PER I-PER O B-LOC", [("PER", 1, 3), ("LOC", 4, 5)], [("PER", 1, 3), ("LOC", 4, 5)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)], [("PER", 0, 1)]),
        ("I-PER I-PER O", [("PER", 0, 2)], []),
        ("B-PER L-PER U-LOC", [("PER", 0, 2), ("LOC", 2, 3)], [("PER", 0, 2), ("LOC", 2, 3)]),
        ("PER PER O LOC PER", [("PER", 0, 2), ("LOC", 3, 4), ("PER", 4, 5)], None),
    ],
)
def test_spans_by_hand(tags, expected, strict):
    assert spans(tags.split()) == [Span(*span) for span in expected]
    if strict is not None:  # labels without prefixes join with their like
        assert spans(tags.split(), strict=True) == [Span(*span) for span in strict]


@pytest.mark.parametrize("strict", [False, True], ids=["conlleval", "strict"])
@pytest.mark.parametrize("names", [IOB2, IOBES], ids=["IOB2", "IOBES"])
def test_figures_are_seqevals(names, strict):
    pytest.importorskip("seqeval")
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2 as StrictIOB2
    from seqeval.scheme import IOBES as StrictIOBES

    scheme = {"mode": "strict", "scheme": StrictIOBES if "S-PER" in names else StrictIOB2} if strict else {}
    kinds = {"precision": (EntityPrecision, precision_score), "f1": (EntityF1, f1_score)}
    kinds["recall"] = (EntityRecall, recall_score)
    metrics = MetricCollection({name: kind(names, strict=strict) for name, (kind, _) in kinds.items()})
    targets, guesses = torch.randint(len(names), (2, 40, 3, 9))
    guesses = torch.where(torch.rand(guesses.shape) < 0.6, targets, guesses)
    known = torch.arange(9) < torch.randint(1, 10, (40, 3, 1))
    for batch in range(40):
        metrics.update(guesses[batch], targets[batch].masked_fill(~known[batch], -100))
    rows = list(zip(targets.flatten(0, 1), guesses.flatten(0, 1), known.flatten(0, 1), strict=True))
    true = [[names[i] for i in row[k]] for row, _, k in rows]
    guessed = [[names[i] for i in row[k]] for _, row, k in rows]
    for name, (_, witness) in kinds.items():
        expected = witness(true, guessed, zero_division=0, **scheme)
        assert 0 < expected < 1
        assert float(metrics.compute()[name]) == pytest.approx(expected, abs=1e-6)


def test_two_processes_sum_their_counts():
    """What torchmetrics does with states that are summed: the figure of all is not the mean of two."""
    targets, predictions = torch.tensor([[1, 2, 0, 3]]), torch.tensor([[1, 2, 0, 0]])
    one, other, both = (EntityF1(IOB2) for _ in range(3))
    one.update(predictions, targets)
    other.update(targets, targets)
    both.update(torch.cat([predictions, targets]), torch.cat([targets, targets]))
    for state, reduction in one._reductions.items():
        setattr(one, state, reduction(torch.stack([getattr(one, state), getattr(other, state)])))
    assert float(one.compute()) == float(both.compute()) == pytest.approx(2 * 3 / (3 + 4))


def test_metrics_count_words_and_the_loss_all_labelled_pieces():
    labels = torch.tensor([[-100, 1, 1, 2], [-100, 0, -100, -100]])
    word_ids = torch.tensor([[-1, 0, -1, 1], [-1, 0, -1, -1]])
    out = TokenClassification(IOB2).step(Says(torch.randn(2, 4, 5)), {"x": 0, "labels": labels, "word_ids": word_ids})
    assert out.weight == 4
    assert out.targets.tolist() == [[-100, 1, -100, 2], [-100, 0, -100, -100]]


def test_predictions_are_of_words_whatever_their_pieces():
    best = torch.tensor([[0, 1, 4, 2, 0, 3], [0, 3, 4, 0, 0, 0]])
    batch = {
        "x": best,
        "word_ids": torch.tensor([[-1, 0, -1, 1, 2, -1], [-1, 0, 1, -1, -1, -1]]),
        "words": [["Ann", "Lee", "saw", "Oslo"], ["New", "York"]],
    }
    out = TokenClassification(IOB2).predict(Says(nn.functional.one_hot(best, 5).float()), batch)
    assert out["labels"] == [["B-PER", "I-PER", "O", None], ["B-LOC", "I-LOC"]]
    assert out["entities"] == [
        [{"kind": "PER", "start": 0, "end": 2, "text": "Ann Lee"}],
        [{"kind": "LOC", "start": 0, "end": 2, "text": "New York"}],
    ]
