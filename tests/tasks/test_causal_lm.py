"""The next token's loss and what is counted of it, against arithmetic of its own on the model's logits."""

import math
import warnings

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lora_lightning.tasks.language_model import CausalLM
from tests.tiny_lm import VOCABULARY, make_model


def batch_of(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.stack([torch.arange(max(lengths)) < n for n in lengths]).long()
    ids = torch.randint(3, len(VOCABULARY), mask.shape, generator=draw) * mask + 2 * (1 - mask)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def by_hand(model, batch):
    """Of each row, the losses of its tokens and whether each was guessed."""
    with torch.no_grad():
        p = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().log_softmax(-1)
    rows = []
    for log_p, labels in zip(p, batch["labels"], strict=True):
        told = [(t, int(y)) for t, y in enumerate(labels[1:].tolist()) if y != -100]
        rows.append([(-float(log_p[t, y]), int(log_p[t].argmax()) == y) for t, y in told])
    return rows


BATCHES = [batch_of(9, 4, 7), batch_of(2, 3, seed=1), batch_of(11, seed=2)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_figures_of_a_stage_weigh_tokens_and_not_batches(kind):
    model, task = make_model(kind, dtype=torch.float64), CausalLM()
    for batch in BATCHES:
        with torch.no_grad():
            metrics = task.update("val", task.evaluate(model, batch))
        out = task.step(model, batch)
        assert (out.weight, out.loss.requires_grad) == (int((batch["labels"][:, 1:] != -100).sum()), True)
    tokens = [token for batch in BATCHES for row in by_hand(model, batch) for token in row]
    mean = sum(loss for loss, _ in tokens) / len(tokens)
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert found["val/loss"] == pytest.approx(mean, rel=1e-6)
    assert found["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert found["val/token_accuracy"] == pytest.approx(sum(hit for _, hit in tokens) / len(tokens))
    said = task.predict(model, BATCHES[0])
    for i, row in enumerate(by_hand(model, BATCHES[0])):  # each as if it were alone
        assert said["tokens"][i] == len(row)
        assert float(said["loss"][i]) == pytest.approx(sum(loss for loss, _ in row) / len(row), rel=1e-6)
        assert float(said["perplexity"][i]) == pytest.approx(math.exp(float(said["loss"][i])), rel=1e-6)
    of_batches = [sum(loss for row in by_hand(model, b) for loss, _ in row) for b in BATCHES]
    assert found["val/perplexity"] != pytest.approx(sum(map(math.exp, of_batches)) / 3, rel=1e-2)


def test_smoothing_is_for_training_alone_and_a_batch_without_labels_counts_for_nothing():
    model, task = make_model("llama", dtype=torch.float64), CausalLM(label_smoothing=0.2)
    smooth, plain = task.step(model, BATCHES[0]), task.evaluate(model, BATCHES[0])
    tokens = [loss for row in by_hand(model, BATCHES[0]) for loss, _ in row]
    assert float(plain.loss) == pytest.approx(sum(tokens) / len(tokens), rel=1e-9)
    assert float(smooth.loss) > float(plain.loss)
    assert "train/perplexity" not in task.update("train", smooth)
    before = float(task.update("val", plain)["val/perplexity"].compute())
    nothing = batch_of(5) | {"labels": torch.full((1, 5), -100)}
    out = task.step(model, nothing)
    out.loss.backward()
    assert (float(out.loss.detach()), out.weight) == (0.0, 0)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert float(task.update("val", task.evaluate(model, nothing))["val/perplexity"].compute()) == before


def test_a_routers_loss_that_the_config_asks_for_and_nobody_adds_is_said_once():
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    task, ids = CausalLM(), torch.arange(8)[None]

    def step(**config):
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **config))
        return [task.step(model, {"input_ids": ids, "labels": ids}) for _ in range(2)]

    with pytest.warns(UserWarning, match="router's auxiliary loss") as said:
        step(output_router_logits=True)
    assert sum("router" in str(warning.message) for warning in said) == 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step()
        step(output_router_logits=True, router_aux_loss_coef=0.0)
    assert not [w for w in said if "router" in str(w.message)]
