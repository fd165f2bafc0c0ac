"""Metrics of texts against their own libraries, where they are there; and over any batches the same."""

import random

import pytest
import torch
from torchmetrics import MetricCollection

from lora_lightning import LoRAError
from lora_lightning.tasks.generation import ExactMatch, generation_metrics

NAMES = ["bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "exact_match"]
WORDS = "the cat sat on a mat , and dogs don't like it .".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(0)
    texts, references = [], []
    for row in range(30):
        own = [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))) for _ in range(rng.randint(1, 3))]
        words = own[0].split()
        for _ in range(row % 5):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(" ".join(words))
        references.append(own)
    return texts, references


def collected(names):
    return MetricCollection(dict(generation_metrics(names)), compute_groups=False)


def computed(texts, references, size):
    metrics = collected(NAMES)
    for start in range(0, len(texts), size):
        metrics.update(texts[start : start + size], references[start : start + size])
    return {name: float(value) for name, value in metrics.compute().items()}


def test_figures_do_not_depend_on_batches_and_processes_sum_their_states(corpus):
    whole = computed(*corpus, len(corpus[0]))
    assert all(0 < value < 1 for value in whole.values())
    for size in (1, 7):
        assert computed(*corpus, size) == pytest.approx(whole, rel=1e-6)
    one, other, texts, references = collected(NAMES), collected(NAMES), *corpus
    one.update(texts[:11], references[:11])
    other.update(texts[11:], references[11:])
    for name, metric in one.items():  # as torchmetrics does over processes
        for state, reduction in metric._reductions.items():
            setattr(metric, state, reduction(torch.stack([getattr(metric, state), getattr(other[name], state)])))
        metric._computed = None
    assert {name: float(value) for name, value in one.compute().items()} == pytest.approx(whole, rel=1e-6)


def test_a_text_matches_one_of_its_references_whatever_blanks_surround_it():
    metric = ExactMatch()
    metric.update(["a b c d", " yes "], [["a c d", "z"], ["no", "yes"]])
    assert float(metric.compute()) == 0.5


def test_rouge_is_googles(corpus):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    ours = computed(*corpus, 4)
    for key in ("rouge1", "rouge2", "rougeL"):
        scores = [scorer.score_multi(own, text)[key].fmeasure for text, own in zip(*corpus, strict=True)]
        assert ours[key] == pytest.approx(sum(scores) / len(scores), rel=1e-6)


def test_bleu_chrf_and_ter_are_sacrebleus(corpus):
    sacrebleu = pytest.importorskip("sacrebleu")
    texts, references = corpus
    most = max(map(len, references))
    # By sacrebleu's own convention a stream for each reference; a short list leaves None where there is none.
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    ours = computed(texts, references, 4)
    assert ours["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score / 100, rel=1e-5)
    assert ours["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, streams, word_order=2).score / 100, rel=2e-2)
    assert ours["ter"] == pytest.approx(sacrebleu.corpus_ter(texts, streams).score / 100, rel=2e-2)


def test_a_package_that_is_missing_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoRAError, match=r"pip install 'lora_lightning\[text-metrics\]'"):
        generation_metrics(["rougeLsum"])
