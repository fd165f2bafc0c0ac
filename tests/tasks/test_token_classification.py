"""Entities as seqeval finds them, counted over everything seen; the loss over labelled tokens alone."""

import random

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lora_lightning import LoRAError
from lora_lightning.tasks.metrics.entities import EntityF1, EntityPrecision, EntityRecall, Span, Tagging
from lora_lightning.tasks.token_classification import TokenClassification

IOB2 = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
IOBES = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC") for prefix in "BIES")]


def spans(tags, names=None, **kwargs):
    names = names or sorted({"O", *tags})
    return Tagging(names, **kwargs).spans([names.index(tag) for tag in tags])


@pytest.mark.parametrize(
    ("tags", "expected", "strict"),
    [
        ("O B-PER I-PER O B-LOC", [("PER", 1, 3), ("LOC", 4, 5)], [("PER", 1, 3), ("LOC", 4, 5)]),
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)], [("PER", 0, 1), ("PER", 1, 3)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)], [("PER", 0, 1)]),
        ("I-PER I-PER O", [("PER", 0, 2)], []),
        ("S-PER I-PER E-PER", [("PER", 0, 1), ("PER", 1, 3)], [("PER", 0, 1)]),
        ("B-PER E-PER B-LOC", [("PER", 0, 2), ("LOC", 2, 3)], [("PER", 0, 2)]),
        ("B-PER L-PER U-LOC", [("PER", 0, 2), ("LOC", 2, 3)], [("PER", 0, 2), ("LOC", 2, 3)]),
        ("O O", [], []),
    ],
)
def test_spans_by_hand(tags, expected, strict):
    assert spans(tags.split()) == [Span(*span) for span in expected]
    assert spans(tags.split(), strict=True) == [Span(*span) for span in strict]


def test_labels_without_prefixes_join_with_their_like():
    assert spans(["PER", "PER", "O", "LOC", "PER"]) == [Span("PER", 0, 2), Span("LOC", 3, 4), Span("PER", 4, 5)]


@pytest.mark.parametrize(
    ("names", "strict", "said"),
    [
        (["O", "B-PER", "MISC"], False, "label 'B-PER' has a prefix .* 'MISC' has none"),
        (["O", "PER"], True, "strict needs labels with prefixes, such as B-PER"),
    ],
)
def test_labels_that_mean_no_entities_are_refused(names, strict, said):
    with pytest.raises(LoRAError, match=said):
        TokenClassification(names, strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["conlleval", "strict"])
@pytest.mark.parametrize("names", [IOB2, IOBES], ids=["IOB2", "IOBES"])
def test_figures_are_seqevals(names, strict):
    pytest.importorskip("seqeval")
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2 as StrictIOB2
    from seqeval.scheme import IOBES as StrictIOBES

    rng = random.Random(0)
    scheme = {"mode": "strict", "scheme": StrictIOBES if "S-PER" in names else StrictIOB2} if strict else {}
    kinds = {"precision": (EntityPrecision, precision_score), "f1": (EntityF1, f1_score)}
    kinds["recall"] = (EntityRecall, recall_score)
    metrics = MetricCollection({name: kind(names, strict=strict) for name, (kind, _) in kinds.items()})
    true, guessed = [], []
    for _ in range(40):
        lengths = [rng.randint(1, 9) for _ in range(3)]
        targets = torch.full((3, 9), -100)
        predictions = torch.randint(len(names), (3, 9))
        for row, length in enumerate(lengths):
            targets[row, :length] = torch.randint(len(names), (length,))
            keep = torch.rand(length) < 0.6
            predictions[row, :length][keep] = targets[row, :length][keep]
            true.append([names[i] for i in targets[row, :length]])
            guessed.append([names[i] for i in predictions[row, :length]])
        metrics.update(predictions, targets)
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


class Logits(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids):
        return {"logits": self.logits}


def test_loss_is_the_mean_over_labelled_tokens_and_the_metrics_count_words():
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[-100, 1, 1, 2], [-100, 0, -100, -100]])
    word_ids = torch.tensor([[-1, 0, -1, 1], [-1, 0, -1, -1]])
    batch = {"input_ids": labels, "labels": labels, "word_ids": word_ids}
    out = TokenClassification(IOB2).step(Logits(logits), batch)
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 1, 1] + log_p[0, 2, 1] + log_p[0, 3, 2] + log_p[1, 1, 0]) / 4
    assert float(out.loss) == pytest.approx(float(expected), rel=1e-6)
    assert out.weight == 4
    assert out.targets.tolist() == [[-100, 1, -100, 2], [-100, 0, -100, -100]]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_epoch_figures_weigh_tokens_and_do_not_depend_on_batches(batch_size):
    torch.manual_seed(1)
    logits, labels = torch.randn(5, 7, 5), torch.randint(-1, 5, (5, 7))
    labels[labels == -1] = -100
    task = TokenClassification(IOB2)
    for part in torch.arange(5).split(batch_size):
        out = task.step(Logits(logits[part]), {"input_ids": labels[part], "labels": labels[part]})
        figures = task.update("val", out)
    counted = labels != -100
    assert set(figures) == {f"val/{name}" for name in ("loss", "accuracy", "precision", "recall", "f1")}
    whole = nn.functional.cross_entropy(logits[counted], labels[counted])
    assert float(figures["val/loss"].compute()) == pytest.approx(float(whole), rel=1e-6)
    right = (logits.argmax(-1) == labels)[counted].float().mean()
    assert float(figures["val/accuracy"].compute()) == pytest.approx(float(right))
    once = EntityF1(IOB2)
    once.update(logits.argmax(-1), labels)
    assert float(figures["val/f1"].compute()) == float(once.compute())


def test_predictions_are_of_words_whatever_their_pieces():
    best = torch.tensor([[0, 1, 4, 2, 0, 3], [0, 3, 4, 0, 0, 0]])
    batch = {
        "input_ids": best,
        "word_ids": torch.tensor([[-1, 0, -1, 1, 2, -1], [-1, 0, 1, -1, -1, -1]]),
        "words": [["Ann", "Lee", "saw", "Oslo"], ["New", "York"]],
    }
    out = TokenClassification(IOB2).predict(Logits(nn.functional.one_hot(best, 5).float()), batch)
    assert out["labels"] == [["B-PER", "I-PER", "O", None], ["B-LOC", "I-LOC"]]
    assert out["entities"] == [
        [{"kind": "PER", "start": 0, "end": 2, "text": "Ann Lee"}],
        [{"kind": "LOC", "start": 0, "end": 2, "text": "New York"}],
    ]


def test_parts_of_speech_have_no_entities():
    task = TokenClassification(["NOUN", "VERB", "I-x"], entities=False)
    assert task.monitor == "val/accuracy"
    assert set(task.metrics["val_"].keys()) == {"val/accuracy"}


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), r"must return logits \(1, 2, 5\).* got \(1, 2, 3\)")],
)
def test_a_batch_that_cannot_be_trained_on_is_refused(logits, labels, said):
    with pytest.raises(LoRAError, match=said):
        TokenClassification(IOB2).step(Logits(logits), {"input_ids": labels, "labels": labels})
