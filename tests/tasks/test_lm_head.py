"""The loss through the head alone is that of the model's own logits, over families of models."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutput

from lora_lightning import LoRAConfig, LoRAError, inject
from lora_lightning.tasks.losses import linear_cross_entropy, lm_head
from lora_lightning.tasks.losses.lm_head import shifted_loss
from tests.distributed import one_process
from tests.factories import move
from tests.tiny_lm import make_model

PLAIN = ("llama", "mistral", "phi", "gpt2", "gpt_neox", "falcon", "bloom", "mamba")
FAMILIES = {
    **{family: {} for family in PLAIN},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 5.0, "initializer_range": 1.0},
    "gemma3_text": {"final_logit_softcapping": None},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 7.0},
    "opt": {"word_embed_proj_dim": 12},
    "falcon_h1": {"lm_head_multiplier": 0.4, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8},
    "mixtral": {"num_local_experts": 2, "experts_implementation": "eager"},
}


def causal(family, dtype=torch.float64, **more):
    options = {"vocab_size": 61, "initializer_range": 0.02, **FAMILIES[family], **more}
    model = make_model(family, **options).to(dtype)
    with torch.no_grad():  # so that bounds and biases matter
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif "embed" in name or "lm_head" in name or "wte" in name:
                p.mul_(3)
    return model.requires_grad_(False)


def batch(rows=3, length=9, vocabulary=61):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.where((mask == 1) & (torch.rand(ids.shape, generator=g) < 0.7), ids, -100)
    return {"input_ids": ids, "attention_mask": mask}, labels


def plain(model, inputs, labels, smoothing=0.0):
    """From all logits, by torch alone."""
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    logits, y = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:].flatten()
    loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=smoothing)
    return loss, int((y != -100).sum()), int(((logits.argmax(-1) == y) & (y != -100)).sum())


def gradients(model, loss):
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same(model, *, smoothing=0.0, tolerance=1e-10):
    inputs, labels = batch()
    ours = shifted_loss(model, inputs, labels, label_smoothing=smoothing)
    loss, count, correct = plain(model, inputs, labels, smoothing)
    assert (ours.count, int(ours.correct)) == (count, correct)
    assert float(ours.loss) == pytest.approx(float(loss), rel=tolerance)
    expected, got = gradients(model, loss), gradients(model, ours.loss)
    for key, value in expected.items():
        assert float((got[key] - value).abs().max()) <= tolerance * float(value.abs().max()) + 1e-300, key
    assert any(float(value.abs().max()) > 0 for value in expected.values())


def adapted(family, *, vocabulary=61, **config):
    model = causal(family, vocab_size=vocabulary)
    options = {"r": 2, "target_modules": "all-linear", **config}
    inject(model, LoRAConfig(**options))
    return move(model)


@contextmanager
def not_said():
    """Within the block no model may say that it computes all its logits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*computes the logits of all tokens")
        yield


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operation within the block gives."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.found = max(self.found, t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_through_the_head_is_that_of_the_models_own_logits(family):
    model, smoothing = adapted(family), 0.1 * (len(family) % 2)
    with not_said():
        # Mamba's own logits are float32 whatever its weights are.
        assert_same(model, smoothing=smoothing, tolerance=1e-6 if family == "mamba" else 1e-10)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 11]},
    ],
    ids=["adapted", "dora", "copied", "frozen", "rows of the embedding"],
)
def test_a_head_that_trains_gets_its_own_gradients_in_chunks(config, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "FLOOR", 4 * 900 * 8)
    model = adapted("qwen2" if "trainable_token_indices" in config else "llama", vocabulary=900, **config)
    with not_said():
        shifted_loss(model, *batch())
    inputs, labels = batch(rows=6, length=20)
    with not_said(), Largest() as largest:
        shifted_loss(model, inputs, labels).loss.backward()
    assert largest.found < 6 * 20 * 900 / 4, "no tensor held the logits of all tokens"
    assert_same(model)


class Cubed(transformers.LlamaForCausalLM):
    def forward(self, **kwargs):
        out = super().forward(**kwargs)
        out.logits = out.logits + 0.01 * out.logits**3
        return out


class Flat(transformers.LlamaForCausalLM):
    def forward(self, **kwargs):
        hidden = self.model(**kwargs).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]))


WHOLE = {
    "more to its logits": (lambda m: setattr(m, "__class__", Cubed), "Cubed computes .* at once, .* does more to its"),
    "rows": (lambda m: setattr(m, "__class__", Flat), "Flat computes the logits of all tokens at once"),
    "hooks": (lambda m: m.lm_head.register_forward_hook(lambda *_: None), "its head has hooks, which are to see every"),
    "compiled": (lambda m: m.compile(backend="eager"), "compiled as a whole, head and all; compile its layers or its"),
    "a compiled body": (lambda m: m.model.compile(backend="eager"), None),
    "checkpointing": (lambda m: m.gradient_checkpointing_enable({"use_reentrant": False}) or m.train(), None),
    "all trains": (lambda m: m.requires_grad_(True), None),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_whose_head_is_not_alone_computes_all_its_logits_says_so_once_and_has_the_same_loss(name):
    change, said = WHOLE[name]
    model = causal("qwen2") if name == "all trains" else adapted("llama")  # its weights are tied
    change(model)
    if said is not None:
        with pytest.warns(UserWarning, match=said):
            assert_same(model)
    with not_said():
        assert_same(model)


def test_a_sharded_model_computes_its_logits():
    model, whole = adapted("llama"), adapted("llama")
    with one_process() as mesh, pytest.warns(UserWarning, match="its head's weights are sharded"):
        ours = shifted_loss(fully_shard(model, mesh=mesh), *batch())
    expected = shifted_loss(whole, *batch())
    assert float(ours.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_it_is_the_plain_way_to_rounding(family, autocast):
    model = causal(family, torch.float32 if autocast else torch.bfloat16)
    inject(model, LoRAConfig(r=2))
    inputs, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), not_said():
        ours = shifted_loss(model, inputs, labels)
        loss, count, correct = plain(model, inputs, labels)
    assert (ours.loss.dtype, ours.count) == (torch.float32, count)
    assert abs(int(ours.correct) - correct) <= (family == "gemma2"), "what is bound in bfloat16 is often equal"
    assert float(ours.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-2)
    expected, got = gradients(model, loss), gradients(model, ours.loss)
    for key, value in expected.items():
        assert float((got[key] - value).norm()) <= 0.05 * float(value.norm()), key


def test_to_find_out_draws_no_random_numbers_and_is_done_once_for_each_model():
    model = adapted("llama", target_modules=["q_proj", "lm_head"], dropout=0.3).train()
    torch.manual_seed(5)
    first = shifted_loss(model, *batch()).loss
    torch.manual_seed(5)
    assert torch.equal(first, shifted_loss(model, *batch()).loss)
    assert copy.deepcopy(model) not in lm_head._FOUND


def test_a_bounded_head_with_dropout_draws_the_same_mask_again_in_backward():
    model = adapted("gemma2", target_modules=["lm_head"], dropout=0.5).train()
    total = {}
    for eps in (-1e-5, 1e-5):
        with torch.no_grad():
            model.lm_head.lora_B[3, 1] += eps
            torch.manual_seed(1)
            total[eps] = float(shifted_loss(model, *batch()).loss)
            model.lm_head.lora_B[3, 1] -= eps
    torch.manual_seed(1)
    shifted_loss(model, *batch()).loss.backward()
    assert float(model.lm_head.lora_B.grad[3, 1]) == pytest.approx((total[1e-5] - total[-1e-5]) / 2e-5, rel=1e-6)


HEADS = [(lambda: adapted("llama"), "input_ids"), (lambda: nn.Embedding(61, 61), "input")]


@pytest.mark.parametrize(("make", "name"), HEADS, ids=["a head", "all logits"])
def test_labels_that_do_not_fit_are_refused(make, name):
    ids = batch()[0]["input_ids"]
    with pytest.raises(LoRAError, match=r"labels \(3, 8\) need one row of .* each, got \(3, 9, "):
        shifted_loss(make(), {name: ids}, ids[:, 1:])
    with pytest.raises(LoRAError, match=r"label 61 is outside of the head's 61 entries: labels are 0 to 60, or -100"):
        shifted_loss(make(), {name: ids}, torch.full_like(ids, 61))
    with pytest.raises(LoRAError, match="label -1 is outside"):
        shifted_loss(make(), {name: ids}, torch.full_like(ids, -1))
