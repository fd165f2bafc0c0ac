"""Which entries belong to which row is proven: where sizes only happen to be equal, right numbers or a refusal."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from lora_lightning import AdapterBank, LoRAError
from lora_lightning.lora.bank.row_proof import layouts
from tests.lora.bank_support import trained
from tests.lora.test_bank_rows import each_alone


def bank_of(model, targets, names="abc"):
    bank = AdapterBank(model.double().eval())
    for seed, name in enumerate(names):
        bank.activate(None)
        trained(bank.model, {"r": 2, "target_modules": targets}, seed=seed)
        bank.add(name)
    return bank


def in_rows(bank, names, x, run):
    with bank.rows(names), torch.no_grad():
        return run(bank.model, x)


def differs(bank, names, x, run=lambda model, x: model(x)):
    with torch.no_grad():
        wanted = each_alone(bank, x, names, run)
    return float((in_rows(bank, names, x, run) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("length", [2, 3, 5])
def test_xlnet_lays_positions_first_inside(length):
    torch.manual_seed(0)
    model = XLNetModel(XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=32))
    ids = torch.randint(1, 40, (3, length))
    run = lambda model, x: model(input_ids=x)[0]  # noqa: E731
    assert differs(bank_of(model, ["layer_1", "layer_2"]), ["b", "a", None], ids, run) < 1e-12


class Turned(nn.Module):
    """A linear layer that sees (length, rows, width), or that flattened."""

    def __init__(self, flat=False):
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.inner, self.outer = flat, nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = x.transpose(0, 1)
        inner = self.inner(x.flatten(0, 1)).view_as(x) if self.flat else self.inner(x)
        return self.outer(inner.tanh().transpose(0, 1))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 6])
@pytest.mark.parametrize("equal", [False, True])
def test_positions_first_inside_a_model_of_ones_own(flat, length, equal):
    """Also where all rows are the same, as one prompt for each adapter."""
    x = torch.randn(3, length, 8, dtype=torch.float64)
    x = x[:1].repeat(3, 1, 1) if equal else x
    assert differs(bank_of(Turned(flat), ["inner", "outer"]), ["c", "a", None], x) < 1e-12


def test_another_length_and_another_batch_are_proven_anew():
    bank = bank_of(Turned(), ["inner"])
    xs = [torch.randn(3, length, 8, dtype=torch.float64) for length in (3, 6, 3, 1)]
    wanted = [each_alone(bank, x, ["c", "a", None], lambda model, x: model(x)) for x in xs]
    with bank.rows(["c", "a", None]):
        for x, w in zip(xs, wanted, strict=True):
            assert (bank.model(x) - w).abs().max() < 1e-12


class Queries(nn.Module):
    """Learned queries have no rows, though there are as many."""

    def __init__(self, count):
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.proj = nn.Parameter(torch.randn(count, 8)), nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.proj(self.queries).mT


class Experts(nn.Module):
    """A token goes to one expert; `how` it gets there differs."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.gate = how, nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen, out = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            if self.how == "slots":  # as many slots as tokens, filled in order
                taken = chosen == i
                slots = torch.nn.functional.one_hot((taken.cumsum(0) - 1).clamp(min=0), len(flat)) * taken[:, None]
                out = out + slots.to(x.dtype) @ expert(slots.to(x.dtype).mT @ flat)
            else:
                out[chosen == i] = expert(flat[chosen == i])
        return out.view_as(x)


class Packed(nn.Module):
    """Rows of different lengths, packed: position 0 of every row, then position 1 of those that have one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.inner(packed.data).sum(), packed


@pytest.mark.parametrize(
    ("make", "layer", "shape"),
    [
        (lambda: Queries(2), "proj", (2, 5, 8)),
        (lambda: Queries(10), "proj", (2, 5, 8)),
        (lambda: Experts("subset"), "experts.*", (2, 4, 8)),
        (lambda: Experts("subset"), "experts.*", (2, 1, 8)),
        (lambda: Experts("slots"), "experts.*", (2, 1, 8)),
        (lambda: Experts("slots"), "experts.*", (2, 3, 8)),
    ],
    ids=range(6),
)
def test_where_sizes_only_happen_to_be_equal_the_layer_is_named(make, layer, shape):
    """Over 20 batches, of which some have as many tokens for an expert as rows, none gives wrong numbers."""
    bank = bank_of(make(), [layer.replace("*", "0"), layer.replace("*", "1")] if "*" in layer else [layer])
    for seed in range(20):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with bank.rows(["a", "b"]), pytest.raises(LoRAError, match=rf"'{layer}.*' sees .* which row cannot be known"):
            bank.model(x)


def test_packed_rows_of_different_lengths_are_refused():
    bank = bank_of(Packed(), ["inner"])
    with bank.rows(["a", "b"]), pytest.raises(LoRAError, match=r"'inner' sees \(4, 8\)"):
        bank.model(torch.randn(2, 3, 8, dtype=torch.float64), torch.tensor([3, 1]))


def test_experts_of_switch_transformers_are_refused_and_its_attention_is_right():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 2}
    sizes |= {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "decoder_start_token_id": 0, "pad_token_id": 0}
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes))
    ids = torch.randint(1, 40, (2, 3))
    run = lambda model, x: model(input_ids=x, decoder_input_ids=x).logits  # noqa: E731
    bank = bank_of(model, ["q", "v"])
    assert differs(bank, ["a", "b"], ids, run) < 1e-12
    bank = bank_of(model, ["wi", "wo"], "de") if bank.activate(None) is None else bank
    with bank.rows(["d", "e"]), pytest.raises(LoRAError, match="which row cannot be known"):
        run(bank.model, ids)


def test_rows_that_all_have_the_same_adapter_need_no_proof():
    """Then it does not matter which is which: learned queries and experts have it too."""
    bank = bank_of(Queries(2), ["proj"])
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert differs(bank, ["b", "b"], x) < 1e-12


def test_a_proof_leaves_what_it_is_given_and_the_random_numbers_alone():
    """A cache is copied, and the numbers drawn after are those without the block."""
    bank = bank_of(Turned(), ["inner"])
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    before, state = x.clone(), torch.get_rng_state()
    with bank.rows(["a", None, "b"]):
        bank.model(x)
        again = bank.model(x)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again, in_rows(bank, ["a", None, "b"], x, lambda model, x: model(x)))


def test_a_proof_is_made_once_for_each_shape():
    bank, calls = bank_of(Turned(), ["inner"]), []
    bank.model.inner.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    with bank.rows(["a", None, "b"]):
        for length in (4, 4, 4, 5, 4):
            bank.model(torch.randn(3, length, 8, dtype=torch.float64))
    assert calls == [6, 3, 3, 3, 6, 3, 3]


def test_what_reads_the_same_backwards():
    """Rows 0, 1 | 1, 0 of two positions each: in blocks, alternating, and what has no rows."""
    rows = torch.tensor([0, 1, 1, 0])
    blocks, alternating = rows[:, None] * 10 + torch.arange(2), rows + 10 * torch.arange(2)[:, None]
    assert layouts(blocks.flatten(), 2, [0]) == {0: [False]}
    assert layouts(alternating.flatten(), 2, [0]) == {0: [True]}
    assert layouts(torch.arange(8), 2, [0]) == {}
    assert layouts(torch.ones(8), 2, [0]) == {0: [False, True]}  # two answers are none
    assert layouts(rows, 2, [0]) == {0: [False]}


SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "a head on one position": lambda: RobertaForSequenceClassification(
        RobertaConfig(**SIZES, intermediate_size=24, pad_token_id=1, max_position_embeddings=20)
    ),
    "rows and positions in one": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=20)
    ),
    "windows": lambda: SwinForImageClassification(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_need_no_more_than_their_inputs(name):
    """With a mask, whose truth the model asks, and as many positions as rows."""
    torch.manual_seed(0)
    model = MODELS[name]()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    x = torch.randint(3, 40, (3, 3)) if name != "windows" else torch.randn(3, 3, 16, 16, dtype=torch.float64)
    masked = {} if name == "windows" else {"attention_mask": True}

    def run(model, x):
        more = {key: torch.ones_like(x) for key in masked}
        return model(x, **more).logits

    assert differs(bank_of(model, linear), ["c", "a", None], x, run) < 1e-12
