"""Preference losses against independent arithmetic in float64; the frozen model is the reference."""

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, PreferenceTuning, StepOutput, disabled, huggingface, inject
from lora_lightning.tasks.preference import FIGURES, LogProbs, PreferenceTerms, preference_losses, sequence_log_probs
from lora_lightning.tasks.preference import without_gradients as frozen
from tests.factories import move
from tests.tiny_pairs import make_llama

LOSSES = [
    ("sigmoid", {}),
    ("sigmoid", {"label_smoothing": 0.1, "rpo_alpha": 0.7}),
    ("robust", {"label_smoothing": 0.2}),
    ("hinge", {}),
    ("ipo", {"rpo_alpha": 0.3}),
    ("simpo", {"gamma": 0.9, "label_smoothing": 0.1}),
    ("orpo", {}),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


def model_of(directory, **config):
    """Adapted, in float64, with an update that shows."""
    model = huggingface(str(directory), "AutoModelForCausalLM").double()
    inject(model, LoRAConfig(r=4, **config))
    return move(model, 0.2)


def batch_of(pairs=3, length=9):
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 32, (2 * pairs, length), generator=g)
    mask, labels = torch.ones_like(ids), ids.clone()
    for i in range(2 * pairs):
        labels[i, : 2 + i % 3] = -100
        end = length - i % 4
        if i % 2:
            ids[i, end:], mask[i, end:], labels[i, end:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def log_prob(model, batch, i):
    """Token by token, by hand: the sum and the number."""
    logits = model(batch["input_ids"][i : i + 1], attention_mask=batch["attention_mask"][i : i + 1]).logits[0]
    total, count = 0.0, 0
    for t in range(1, logits.shape[0]):
        label = int(batch["labels"][i, t])
        if label != -100:
            z = logits[t - 1]
            total = total + z[label] - z.exp().sum().log()
            count += 1
    return total, count


def by_hand(model, batch, loss, beta, label_smoothing=0.0, gamma=0.5, rpo_alpha=0.0):
    """The papers' formulas, one pair at a time. Gives the losses and the two rewards of each."""

    def s(x):
        return 1 / (1 + torch.exp(-x))

    n, out = len(batch["labels"]) // 2, []
    for i in range(n):
        with torch.no_grad(), disabled(model):
            (ref_w, _), (ref_l, _) = log_prob(model, batch, i), log_prob(model, batch, n + i)
        (w, len_w), (lo, len_l) = log_prob(model, batch, i), log_prob(model, batch, n + i)
        e, h = label_smoothing, beta * ((w - ref_w) - (lo - ref_l))
        rewards = beta * (w - ref_w), beta * (lo - ref_l)
        if loss == "sigmoid":
            value = -(1 - e) * s(h).log() - e * s(-h).log()
        elif loss == "robust":
            value = (-(1 - e) * s(h).log() + e * s(-h).log()) / (1 - 2 * e)
        elif loss == "hinge":
            value = torch.clamp(1 - h, min=0)
        elif loss == "ipo":
            rewards = beta * (w - ref_w) / len_w, beta * (lo - ref_l) / len_l
            value = ((rewards[0] - rewards[1]) / beta - 1 / (2 * beta)) ** 2
        elif loss == "simpo":
            rewards = beta * w / len_w, beta * lo / len_l
            d = rewards[0] - rewards[1] - gamma
            value = -(1 - e) * s(d).log() - e * s(-d).log()
        else:
            p_w, p_l = torch.exp(w / len_w), torch.exp(lo / len_l)
            rewards = beta * w / len_w, beta * lo / len_l
            value = -w / len_w - beta * s((p_w / (1 - p_w) / (p_l / (1 - p_l))).log()).log()
        out.append((value - rpo_alpha * w / len_w, *rewards))
    return [torch.stack(column) for column in zip(*out, strict=True)]


@pytest.mark.parametrize(("loss", "terms"), LOSSES, ids=[f"{loss}{len(terms)}" for loss, terms in LOSSES])
def test_loss_gradients_and_rewards_are_the_papers(directory, loss, terms):
    model, batch = model_of(directory), batch_of()
    trained, runs = [p for p in model.parameters() if p.requires_grad], []
    values, chosen, rejected = by_hand(model, batch, loss, 0.3, **terms)
    expected = torch.autograd.grad(values.mean(), trained)
    PreferenceTuning(loss, 0.3, **terms).step(model, batch)  # looks at the head once
    model.model.register_forward_hook(lambda *_: runs.append(1))
    out = PreferenceTuning(loss, 0.3, **terms).step(model, batch)
    assert len(runs) == (1 if loss in ("simpo", "orpo") else 2), "without a reference it runs once"
    assert out.weight == 3
    assert out.loss.item() == pytest.approx(values.mean().item(), rel=1e-10)
    torch.testing.assert_close(out.updates["chosen_reward"][0], chosen.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.updates["rejected_reward"][0], rejected.detach(), rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(out.loss, trained), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        assert float(theirs.abs().max()) > 1e-8


def test_a_trained_copy_of_the_head_is_not_the_references_head(directory):
    """With `disabled`, the original head; the copy's update moves the rewards, and they are those by hand."""
    model, batch = model_of(directory, modules_to_save=["lm_head"]), batch_of()
    values, chosen, _ = by_hand(model, batch, "sigmoid", 0.1)
    out = PreferenceTuning().step(model, batch)
    assert out.loss.item() == pytest.approx(values.mean().item(), rel=1e-10)
    torch.testing.assert_close(out.updates["chosen_reward"][0], chosen.detach(), rtol=1e-9, atol=1e-10)
    plain = huggingface(str(directory), "AutoModelForCausalLM").double()
    with frozen(model):
        reference = sequence_log_probs(model, {k: v for k, v in batch.items() if k != "labels"}, batch["labels"])
    by_plain = [log_prob(plain, batch, i)[0].item() for i in range(6)]
    assert reference.total.tolist() == pytest.approx(by_plain, rel=1e-9)
    assert not reference.total.requires_grad


def test_the_reference_has_no_dropout_of_adapter_or_backbone(directory):
    model, batch = model_of(directory, dropout=0.5).train(), batch_of()
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with frozen(model):
        first, again = (sequence_log_probs(model, inputs, batch["labels"]).total for _ in range(2))
    assert first.tolist() == again.tolist()
    assert all(module.training for module in model.modules())
    noisy = [sequence_log_probs(model, inputs, batch["labels"]).total.tolist() for _ in range(2)]
    assert noisy[0] != noisy[1]


def test_a_model_that_is_not_of_transformers_gives_the_same(directory):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits

    model, batch = model_of(directory), batch_of()
    whole = PreferenceTuning().step(Wrapped(model), batch)
    assert whole.loss.item() == pytest.approx(PreferenceTuning().step(model, batch).loss.item(), rel=1e-12)


def test_epoch_figures_weigh_pairs_and_not_batches(directory):
    """Nor do figures that are all 0 before the first step stay one afterwards."""
    model, task = model_of(directory), PreferenceTuning()
    task.update("val", StepOutput(torch.tensor(0.7), 2, updates=dict.fromkeys(FIGURES, (torch.zeros(2),))))
    task.reset("val")
    whole = batch_of(5)
    rewards = task.step(model, whole)
    chosen, rejected = (rewards.updates[f"{name}_reward"][0] for name in ("chosen", "rejected"))
    for pairs in (range(0, 3), range(3, 5)):
        rows = [*pairs, *(5 + i for i in pairs)]
        metrics = task.update("val", task.step(model, {k: v[rows] for k, v in whole.items()}))
    expected = {
        "val/loss": rewards.loss.item(),
        "val/accuracy": float((chosen > rejected).double().mean()),
        "val/margin": float((chosen - rejected).mean()),
        "val/chosen_reward": float(chosen.mean()),
        "val/rejected_reward": float(rejected.mean()),
    }
    assert {k: float(m.compute()) for k, m in metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert set(metrics) == set(expected)
    said = task.predict(model, whole)
    assert said["chosen_preferred"].tolist() == (said["chosen_reward"] > said["rejected_reward"]).tolist()
    torch.testing.assert_close(said["chosen_reward"], chosen)


def test_orpo_stands_where_an_answer_is_certain():
    sure = LogProbs(torch.tensor([0.0, -3.0], requires_grad=True), torch.tensor([4, 4]))
    loss = preference_losses(sure, None, PreferenceTerms("orpo", 0.1)).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(sure.total.grad).all()
