"""Contrastive losses and retrieval against formulas, transformers' CLIP and torchmetrics; stages count as a whole."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.retrieval import RetrievalMRR, RetrievalRecall
from transformers import CLIPConfig, CLIPModel

from lora_lightning import huggingface
from lora_lightning.tasks.contrastive import ContrastiveEmbedding, Retrieval, info_nce, number_singles, pool, ranks
from tests.tasks.test_misfits import Rows


def pairs(n=7, d=5, negatives=False, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    names = ("anchor", "positive", "negative")[: 3 if negatives else 2]
    return {name: {"x": torch.randn(n, d, generator=g, dtype=dtype)} for name in names}


def cost(anchor, candidates, own, wrong, temperature):
    """-log of the own candidate's share among it and the wrong ones, by hand."""
    e = [(anchor @ c / anchor.norm() / c.norm() / temperature).exp() for c in candidates]
    return -(e[own] / (e[own] + sum(e[j] for j in wrong))).log()


def loss_by_hand(batch, temperature, symmetric, groups=None):
    a, p = batch["anchor"]["x"], batch["positive"]["x"]
    candidates, n = [*p, *(batch["negative"]["x"] if "negative" in batch else [])], len(a)
    groups = groups or list(range(n))
    total = 0.0
    for i in range(n):
        others = [j for j in range(n) if groups[j] != groups[i]]
        total += cost(a[i], candidates, i, [*others, *range(n, len(candidates))], temperature)
        if symmetric:
            total += cost(p[i], list(a), i, others, temperature)
    return total / n / (2 if symmetric else 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("groups", [None, [0, 1, 0, 2, 3, 1, 4]])
def test_the_loss_is_info_nce_over_all_that_is_wrong(symmetric, negatives, groups):
    batch = pairs(negatives=negatives)
    leaves = [part["x"].requires_grad_() for part in batch.values()]
    expected = loss_by_hand(batch, 0.3, symmetric, groups)
    if groups:
        own = torch.tensor(groups).unsqueeze(1)
        batch["labels"] = torch.cat([own, torch.full_like(own, -1)], 1) if negatives else own
    task = ContrastiveEmbedding(0.3, symmetric=symmetric)
    out = task.step(Rows(), batch)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert out.weight == 7
    assert set(task.update("train", out)) == {"train/loss"}
    both = (torch.autograd.grad(loss, leaves) for loss in (out.loss, expected))
    for ours, by_hand in zip(*both, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-12)


def test_a_negative_that_says_what_a_positive_says_is_none():
    batch = pairs(negatives=True)
    batch["negative"]["x"][2] = batch["positive"]["x"][5]
    labels = torch.tensor([[i, i + 7] for i in range(7)])
    labels[2, 1] = 5
    out = ContrastiveEmbedding(0.3).step(Rows(), {**batch, "labels": labels})
    without = {**batch, "labels": torch.tensor([[i, -1] for i in range(7)])}
    assert out.loss.item() < ContrastiveEmbedding(0.3).step(Rows(), without).loss.item()


def test_with_its_own_temperature_a_clip_has_its_own_loss():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 20, "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=sizes | text, vision_config=vision, projection_dim=8)).eval()
    ids = torch.randint(3, 20, (5, 6))
    ids[:, -1] = 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(5, 3, 8, 8)}
    own = model(**batch, return_loss=True)
    out = ContrastiveEmbedding(None, symmetric=True).step(model, batch)
    assert out.loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    predicted = ContrastiveEmbedding(None).predict(model, batch)
    torch.testing.assert_close(predicted["image_embedding"], own.image_embeds)
    torch.testing.assert_close(predicted["text_embedding"], own.text_embeds)


def test_retrieval_is_what_torchmetrics_finds():
    g = torch.Generator().manual_seed(0)
    anchors, positives = torch.randn(40, 6, generator=g), torch.randn(40, 6, generator=g)
    positives += 0.6 * anchors
    similar = anchors @ positives.T
    similar -= similar.min() - 1  # torchmetrics takes what is not above 0 for not found
    index = torch.arange(40).repeat_interleave(40)
    target = torch.eye(40).flatten().bool()
    rows = torch.stack([anchors, positives], 1)
    theirs = {"mrr": RetrievalMRR(), "recall@1": RetrievalRecall(top_k=1), "recall@5": RetrievalRecall(top_k=5)}
    for figure, metric in theirs.items():
        ours = Retrieval(figure)
        ours.update(rows, torch.full((40, 1), -1))
        assert float(ours.compute()) == pytest.approx(float(metric(similar.flatten(), target, index)), rel=1e-6)


def test_a_group_is_one_to_be_found_and_what_it_holds_is_not_counted_twice():
    anchors = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[0.5, 0.0], [0.9, 0.0], [0.8, 0.0], [0.8, 0.0], [0.6, 0.0], [0.4, 0.0]])
    own = torch.tensor([0])
    assert number_singles(torch.tensor([3, -1, 0, -1])).tolist() == [3, 5, 0, 6]
    assert ranks(anchors, candidates, own, torch.tensor([0, 1, 2, 3, 4, 5])).tolist() == [5]
    assert ranks(anchors, candidates, own, torch.tensor([0, 1, 2, 2, 4, 5])).tolist() == [4]
    assert ranks(anchors, candidates, own, torch.tensor([0, 0, 2, 2, 4, 5])).tolist() == [3]


def test_a_model_that_makes_all_texts_alike_has_found_nothing():
    metric = Retrieval("recall@1")
    metric.update(torch.ones(10, 2, 3), torch.full((10, 1), -1))
    assert float(metric.compute()) == 0.0
    assert ranks(torch.ones(10, 3), torch.ones(10, 3), torch.arange(10), torch.arange(10)).tolist() == [5.5] * 10


@pytest.mark.parametrize("negatives", [False, True])
def test_figures_are_over_the_whole_stage_however_it_is_cut(negatives):
    batch = pairs(23, 4, negatives=negatives)
    groups = torch.arange(23).unsqueeze(1) % 20
    batch["labels"] = torch.cat([groups, groups + 100], 1) if negatives else groups
    found = []
    for sizes in ([23], [5, 9, 8, 1]):
        task = ContrastiveEmbedding(0.2, symmetric=True)
        for rows in torch.arange(23).split(sizes):
            part = {k: {"x": v["x"][rows]} if isinstance(v, dict) else v[rows] for k, v in batch.items()}
            metrics = task.update("val", task.evaluate(Rows(), part))
        found.append({name: float(metric.compute()) for name, metric in metrics.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert set(found[0]) == {"val/loss", "val/mrr", "val/recall@1", "val/recall@5"}
    assert found[0]["val/loss"] == pytest.approx(task.step(Rows(), batch).loss.item(), rel=1e-6)
    copy.deepcopy(task)


def test_pooling():
    states = torch.randn(3, 4, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    mean = torch.stack([states[0, :2].mean(0), states[1].mean(0), states[2, 2:].mean(0)])
    torch.testing.assert_close(pool(states, mask, "mean"), mean)
    torch.testing.assert_close(pool(states, mask, "cls"), torch.stack([states[0, 0], states[1, 0], states[2, 2]]))
    torch.testing.assert_close(pool(states, mask, "last"), torch.stack([states[0, 1], states[1, 3], states[2, 3]]))


def test_padding_changes_no_embedding(tiny):
    bert = huggingface(tiny.bert, "AutoModel")
    ids = torch.randint(5, 20, (2, 6))
    padded, mask = F.pad(ids, (0, 3)), F.pad(torch.ones_like(ids), (0, 3))
    for pooling in ("mean", "cls", "last"):
        task = ContrastiveEmbedding(pooling=pooling)
        short = task.predict(bert, {"anchor": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}})
        long = task.predict(bert, {"anchor": {"input_ids": padded, "attention_mask": mask}})
        torch.testing.assert_close(short["embedding"], long["embedding"], rtol=1e-4, atol=1e-5)
        assert short["embedding"].norm(dim=1).tolist() == pytest.approx([1, 1])


def test_half_precision_is_compared_in_float32():
    a, c = (torch.randn(3, 4).bfloat16() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(a, c, torch.arange(3), torch.arange(3), 0.05)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(a.float() @ c.float().T / 0.05, torch.arange(3), reduction="none"))
