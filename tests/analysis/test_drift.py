"""How far an adapter moved its model, against arithmetic of its own; and the strengths of an update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, SequenceClassification, inject
from lora_lightning.analysis.drift import Batch, Drift, Mean, measure_drift, pool_rows, ratio, token_figures
from lora_lightning.analysis.drift_inputs import neutral_texts, pick_evenly, read_texts, run_batches, text_batches
from lora_lightning.analysis.strength import Strength, choose, validation_metrics
from lora_lightning.lora.bank.strength import scaled
from lora_lightning.lora.inject import disabled
from lora_lightning.tasks.language_model import CausalLM
from tests.factories import assert_same, bert, move, snapshot
from tests.tiny_lm import make_model, make_texts, make_tokenizer


def language_model(kind="llama", dtype=torch.float64, **fields):
    model = make_model(kind, dtype=dtype)
    inject(model, LoRAConfig(r=2, **fields))
    return move(model, 0.2)


def texts_of(model, count=24):
    texts = make_texts(count)
    return texts, text_batches(texts, make_tokenizer(), CausalLM(), model, 32)


@torch.no_grad()
def by_hand(model, texts):
    """KL, both losses and changes of every predicted token by text: one text at a time."""
    tokenizer, found = make_tokenizer(), []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        q = model(ids).logits[0, :-1].double().log_softmax(-1)
        with disabled(model):
            p = model(ids).logits[0, :-1].double().log_softmax(-1)
        label = ids[0, 1:, None]
        kl = (p.exp() * (p - q)).sum(-1)
        losses = [-x.gather(-1, label)[:, 0] for x in (p, q)]
        changed = (p.argmax(-1) != q.argmax(-1)).double()
        found.append(torch.stack([kl, *losses, changed], -1).tolist())
    return found


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *((kind, {}) for kind in ("llama", "gpt2", "gemma2")),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_the_kl_is_that_of_independent_arithmetic(kind, fields):
    """To 1e-10 in float64, over texts of other lengths in padded batches; and the rest with it."""
    model = language_model(kind, **fields)
    texts, batches = texts_of(model)
    (found,) = measure_drift(model, batches, texts).values()
    rows = by_hand(model, texts)
    tokens = [row for text in rows for row in text]
    for place, (name, finish) in enumerate(
        [("kl", float), ("perplexity_base", math.exp), ("perplexity", math.exp), ("changed", float)]
    ):
        want = finish(math.fsum(row[place] for row in tokens) / len(tokens))
        assert abs(found.figures[name].value - want) <= 1e-10 * max(1, abs(want)), name
    assert found.tokens == len(tokens)
    assert found.texts == sum(bool(text) for text in rows), "a text of a single token predicts nothing"
    assert found.figures["kl"].value > 1e-3
    sums, counts = [math.fsum(r[0] for r in text) for text in rows if text], [len(text) for text in rows if text]
    R, n = math.fsum(sums) / sum(counts), len(counts)
    squares = math.fsum((s - R * c) ** 2 for s, c in zip(sums, counts, strict=True))
    assert found.figures["kl"].error == pytest.approx(math.sqrt(n / (n - 1) * squares) / sum(counts), rel=1e-8)
    means = {number: math.fsum(r[0] for r in text) / len(text) for number, text in enumerate(rows) if text}
    assert [moved.number for moved in found.most] == sorted(means, key=means.get, reverse=True)[:5]
    assert found.most[0].text == texts[found.most[0].number]
    assert ratio(torch.ones(1), torch.ones(1)).error is None, "of a single text there is none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strength_0_has_not_moved_and_strength_1_is_the_adapter(dtype):
    model = language_model(dtype=dtype)
    texts, batches = texts_of(model, 6)
    found = measure_drift(model, batches, texts, [0.0, 0.5, 1.0])
    assert found[0.0].figures["kl"].value == 0.0, "bit for bit the base"
    assert found[0.0].figures["changed"].value == 0.0
    assert found[0.0].figures["perplexity"] == found[0.0].figures["perplexity_base"]
    assert found[1.0] == measure_drift(model, batches, texts)[1.0]
    assert 0 < found[0.5].figures["kl"].value < found[1.0].figures["kl"].value
    with scaled(model, 0.5):
        assert measure_drift(model, batches, texts)[1.0] == found[0.5]


def test_a_token_that_the_base_rules_out_adds_nothing():
    base, adapted = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    base[0, 2] = -math.inf
    (kl, *_) = token_figures(base, adapted, torch.tensor([0]))[0].tolist()
    q = adapted[0].log_softmax(-1)
    assert kl == pytest.approx(float(0.5 * (math.log(0.5) - q[:2]).sum()), abs=1e-14)


@pytest.fixture
def encoder():
    """A model with a trained head, and a batch for it."""
    model = bert().double().eval()
    inject(model, LoRAConfig(r=2, modules_to_save=["classifier"]))
    ids = torch.randint(1, 40, (6, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return move(model, 0.2), [Batch({"input_ids": ids, "attention_mask": mask}, None, range(6))]


def test_an_encoders_figures_are_those_of_its_pooled_output_and_of_each_block(encoder):
    model, batches = encoder
    inputs = batches[0].inputs
    none, found = measure_drift(model, batches, list("abcdef"), [0.0, 1.0]).values()
    means = [*none.figures.values(), *(mean for layer in none.layers.values() for mean in layer.values())]
    assert {mean.value for mean in means} == {0.0}, "at strength 0 it has not moved"
    with torch.no_grad():
        h = model.bert(**inputs, output_hidden_states=True)
        with disabled(model):
            h0 = model.bert(**inputs, output_hidden_states=True)
    cosine = 1 - torch.cosine_similarity(h0.pooler_output, h.pooler_output)
    assert found.figures["cosine"].value == pytest.approx(float(cosine.mean()), abs=1e-12)
    assert found.figures["cosine"].error == pytest.approx(float(cosine.std() / 6**0.5), rel=1e-8)
    mask = inputs["attention_mask"].double().unsqueeze(-1)
    for number in range(2):
        a, b = ((x.hidden_states[number + 1] * mask).sum(1) / mask.sum(1) for x in (h0, h))
        own = found.layers[f"bert.encoder.layer.{number}"]
        assert own["relative_l2"].value == pytest.approx(float(((b - a).norm(dim=1) / a.norm(dim=1)).mean()), rel=1e-10)
    order = cosine.argsort(descending=True)[:5].tolist()
    assert [moved.text for moved in found.most] == [list("abcdef")[i] for i in order]


def test_an_images_places_are_averaged_wherever_the_channels_lie():
    h, last = torch.randn(2, 5, 3, 4), nn.Module()
    last.norm = nn.LayerNorm(5)
    torch.testing.assert_close(pool_rows(h, 2), h.mean((2, 3)))
    torch.testing.assert_close(pool_rows(h.permute(0, 2, 3, 1), 2, None, last), h.mean((2, 3)))
    assert pool_rows(h, 3) is None


def test_the_model_and_its_modes_are_as_before(encoder):
    model, batches = encoder
    before, state = snapshot(model.train()), torch.get_rng_state()
    measure_drift(model, batches, list("abcdef"), [0.0, 0.5, 1.25])
    assert torch.equal(torch.get_rng_state(), state), "nothing random is drawn"
    assert_same(model, before, but=("attributes",))


def test_what_cannot_be_compared_is_refused_in_one_line():
    plain = make_model("llama")
    with pytest.raises(LoRAError, match="no adapter"):
        measure_drift(plain, [], [])
    model = language_model()
    with pytest.raises(LoRAError, match="two tokens"):
        measure_drift(model, text_batches(["one"], make_tokenizer(), CausalLM(), model, 8), ["one"])

    class Scalar(nn.Linear):
        def forward(self, x):
            return {"score": super().forward(x).sum()}

    scalar = nn.Sequential(Scalar(3, 3))
    inject(scalar, LoRAConfig(r=1, target_modules=["0"]))
    with pytest.raises(LoRAError, match="Sequential has no pooled output"):
        measure_drift(scalar, [Batch({"input": torch.ones(2, 3)}, None, range(2))], ["a", "b"])


def test_the_neutral_set_is_paragraphs_and_texts_are_read_from_files_of_which_a_wrong_cell_is_named(tmp_path):
    """Other mistakes are in tests/command/mistakes.txt."""
    texts = neutral_texts()
    assert len(texts) == len(set(texts)) > 50
    assert all(20 < len(text.split()) < 70 for text in texts)
    assert pick_evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert pick_evenly(range(3), 5) == [0, 1, 2]
    (tmp_path / "a.txt").write_text("one two\n\nthree four\n")
    assert read_texts(str(tmp_path / "a.txt")) == ["one two", "three four"]
    (tmp_path / "a.csv").write_text("body,n\nfirst,1\nsecond,2\n")
    assert read_texts(str(tmp_path / "a.csv"), "body") == ["first", "second"]
    with pytest.raises(LoRAError, match="row 1, column 'n': expected text, got 1"):
        read_texts(str(tmp_path / "a.csv"), "n")


def test_a_runs_own_inputs_are_compared_where_its_task_trains():
    model = language_model()
    ids = torch.tensor([[3, 4, 5, 6], [4, 5, 6, 7]])
    labels = ids.clone()
    labels[0, :3] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    (found,), names = run_batches([batch], CausalLM(), model, make_tokenizer())
    assert found.labels.tolist() == [[-100, -100, 6, -100], [5, 6, 7, -100]]
    assert names[0] == "one two three four"
    assert measure_drift(model, [found], names)[1.0].tokens == 4


def test_the_smallest_strength_within_one_standard_error_of_the_best_is_chosen():
    def chosen(mode, *values, sign=1):
        found = []
        for scale, value, error in values:
            drift = Drift(kind="kl", figures={"kl": Mean(value=scale, error=None)}, texts=1)
            found.append(Strength(scale=scale, drift=drift, metrics={"x": Mean(value=sign * value, error=error)}))
        told = choose("texts", found, "x", mode)
        return told.best, told.chosen

    values = [(0.0, 0.5, 0.02), (0.5, 0.88, 0.02), (1.0, 0.9, 0.03), (1.25, 0.89, 0.03)]
    assert chosen("max", *values) == chosen("min", *values, sign=-1) == (1.0, 0.5)
    assert chosen("max", *((scale, value, None) for scale, value, _ in values))[1] == 1.0, "the best itself"


def test_the_metrics_error_is_that_of_its_examples():
    """Of an accuracy over n examples about sqrt(p (1 - p) / n); and the value is that of the examples."""
    task, random, known = SequenceClassification(2), torch.Generator().manual_seed(0), nn.Identity()
    right = torch.rand(2000, generator=random) < 0.8
    labels = torch.randint(0, 2, (2000,), generator=random)
    logits = nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).float() * 4
    rows = zip(logits.split(20), labels.split(20), strict=True)
    found = validation_metrics(known, task, [(i % 10, {"input": z, "labels": y}) for i, (z, y) in enumerate(rows)])
    p = float(right.double().mean())
    assert found["accuracy"].value == pytest.approx(p, abs=1e-6)
    assert found["accuracy"].error == pytest.approx((p * (1 - p) / 2000) ** 0.5, rel=0.5)
    assert {"loss", "f1"} <= found.keys()
    one = validation_metrics(known, task, [(0, {"input": logits, "labels": labels})])
    assert one["accuracy"].error is None, "of one batch there is none"
    assert set(task.stages("val")) == {"val"}, "the task itself counts nothing"
