"""A batch whose rows name their adapters: against each adapter alone on its rows, in float64, and against PEFT."""

import peft
import pytest
import torch
from torch import nn

from lora_lightning import AdapterBank, LoRAError, save_adapter
from lora_lightning.lora.bank.grouped import entries_of
from tests.factories import FAMILIES, assert_same, llama, output, snapshot
from tests.lora.bank_support import ZOO, adapters, base, trained
from tests.lora.options_support import inputs, net
from tests.lora.test_options_over_kinds import MODELS, embedding


def bank_of(name, folder, dtype=torch.float64):
    bank = AdapterBank(base(name, dtype))
    for letter, (directory, _) in adapters(name, folder, dtype).items():
        bank.load(letter, directory)
    return bank


# Inputs with rows first, by the zoo's names; (rows, ...).
def batch_of(name, count):
    random = torch.Generator().manual_seed(5)
    if name in {"bert", "llama", "gpt", "slices", "gpt2"}:
        return torch.randint(1, 40, (count, 6), generator=random)
    if name == "embedding":
        return torch.randint(0, 9, (count, 5), generator=random)
    shape = {
        "conv": (4, 6, 6),
        "groups": (4, 6, 6),
        "normed": (3, 7),
        "attention": (3, 8),
        "sequential": (8,),
        "own": (3, 8),
        "encoder": (5, 16),
    }.get(name, (7, 12))
    return torch.randn(count, *shape, generator=random, dtype=torch.float64)


def each_alone(bank, x, names, run=output, dim=0):
    """Every row by a batch of its own, its adapter active."""
    outs = []
    for i, name in enumerate(names):
        bank.activate(name)
        outs.append(run(bank.model, x.narrow(dim, i, 1)).detach())
    return torch.cat(outs, dim=dim)


ROWS = ["b", None, "a", "b", "a"]
BY_ROW = [
    "linear",
    "dora",
    "heads",
    "lora_bias",
    "starts",
    "slices",
    "gpt2",
    "conv",
    "groups",
    "embedding",
    "attention",
]


@pytest.mark.parametrize(
    "name", [*BY_ROW, "attention", "normed", "sequential", "own", "encoder", "bert", "llama", "gpt"]
)
def test_every_row_is_as_if_alone_with_its_adapter(name, tmp_path):
    bank = bank_of(name, tmp_path)
    bank.activate("a")
    before, x = snapshot(bank.model), batch_of(name, len(ROWS))
    with bank.rows(ROWS):
        got = output(bank.model, x)
        plain_inside = bank.active is None
    assert plain_inside
    assert bank.active == "a"
    assert not got.requires_grad
    assert_same(bank.model, before)
    wanted = each_alone(bank, x, ROWS)
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    bank.activate(None)
    plain = output(bank.model, x)
    different = [bool((got[i] - plain[i]).abs().max() > 1e-6) for i in range(len(ROWS))]
    assert different == [name is not None for name in ROWS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes(dtype, tmp_path):
    bank = bank_of("linear", tmp_path, dtype)
    x = batch_of("linear", 3).to(dtype)
    with bank.rows(["a", "b", None]):
        got = bank.model(x)
    wanted = each_alone(bank, x, ["a", "b", None])
    assert got.dtype == dtype
    assert (got - wanted).abs().max() <= (1e-5 if dtype == torch.float32 else 5e-2) * wanted.abs().max()


class Attending(nn.Module):
    """torch's attention and its encoder layer, rows first or second, alone and in one model."""

    def __init__(self, batch_first, need_weights):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x):
        return self.layer(self.attention(x, x, x, need_weights=self.need_weights)[0])


@pytest.mark.parametrize("length", [2, 3, 6])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_knows_where_its_rows_are(batch_first, need_weights, length, tmp_path):
    """Also where there are as many positions as rows, or a multiple; out_proj sees both flattened, rows last."""
    model = Attending(batch_first, need_weights).double().eval()
    bank = AdapterBank(trained(model, {"r": 2}, seed=1), first="a")
    bank.activate(None)
    trained(model, {"r": 3, "target_modules": ["attention.out_proj", "linear1"]}, seed=2)
    bank.add("b")
    x = torch.randn(*((3, length) if batch_first else (length, 3)), 8, dtype=torch.float64)
    names = ["b", None, "a"]
    with bank.rows(names):
        got = model(x)
    wanted = each_alone(bank, x, names, dim=0 if batch_first else 1)
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


@pytest.mark.parametrize("make", [llama, t5])
def test_beams_multiply_rows(make):
    """generate with beams hands 2 rows on for each of ours; T5's encoder sees ours, its decoder the beams."""
    torch.manual_seed(0)
    model = make().double().eval()
    bank = AdapterBank(trained(model, {"r": 2}, seed=1), first="a")
    bank.activate(None)
    trained(model, {"r": 4}, seed=2)
    bank.add("b")
    ids = torch.randint(1, 40, (3, 4))
    names, options = ["a", "b", None], {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with bank.rows(names, repeats=2):
        got = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for i, name in enumerate(names):
        bank.activate(name)
        alone = model.generate(ids[i : i + 1], attention_mask=torch.ones(1, 4, dtype=torch.long), **options)
        assert torch.equal(got[i : i + 1], alone)
    with bank.rows(names), pytest.raises(LoRAError, match="say repeats= where beams or returned sequences multiply it"):
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def test_rows_and_positions_flattened_into_one(tmp_path):
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x.flatten(0, 1)))).view_as(x)

    model = Flattens().double().eval()
    bank = AdapterBank(trained(model, {"r": 2, "target_modules": ["first", "second"]}, seed=1), first="a")
    x, names = torch.randn(3, 5, 4, dtype=torch.float64), ["a", None, "a"]
    with bank.rows(names):
        got = model(x)
        with pytest.raises(LoRAError, match=r"'first' sees \(20, 4\), and which of its entries belong to which row"):
            model(torch.randn(4, 5, 4, dtype=torch.float64))
    wanted = each_alone(bank, x, names)
    assert (got - wanted).abs().max() <= 1e-12
    with bank.rows(names), pytest.raises(LoRAError, match=r"'first' sees \(6, 4\)"):
        model.second(model.first(torch.randn(6, 4, dtype=torch.float64)))  # some of the positions, as experts see them


def test_positions_without_rows_are_refused():
    """nanoGPT's arange: one vector of positions for all rows, perhaps as many as there are rows."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(9, 4)

        def forward(self, ids):
            return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))

    model = Positions().eval()
    bank = AdapterBank(trained(model, {"r": 2, "target_modules": ["tokens", "positions"]}, seed=1), first="a")
    with bank.rows(["a", None]), pytest.raises(LoRAError, match=r"'positions' sees \(2,\), and which of its entries"):
        model(torch.ones(2, 2, dtype=torch.long))


def test_pefts_mixed_batch_gives_the_same(tmp_path):
    for letter, r in (("a", 2), ("b", 4)):
        save_adapter(trained(FAMILIES["bert"].build(), {"r": r}, seed=r), tmp_path / letter)
    bank = AdapterBank(FAMILIES["bert"].build())
    other = peft.PeftModel.from_pretrained(FAMILIES["bert"].build(), tmp_path / "a", adapter_name="a").eval()
    other.load_adapter(tmp_path / "b", adapter_name="b")
    for letter in "ab":
        bank.load(letter, tmp_path / letter)
    x = batch_of("bert", len(ROWS))
    with bank.rows(ROWS):
        got = bank.model(x).logits
    wanted = other(input_ids=x, adapter_names=[name or "__base__" for name in ROWS]).logits
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("biases", "rows: 'a' trains a bias at"),
        ("tokens", "rows: 'a' trains token rows at 'embed'"),
        ("experts", "rows: 'a' adapts a bare parameter"),
    ],
)
def test_what_has_no_form_row_by_row_is_refused_by_name(name, message, tmp_path):
    bank = bank_of(name, tmp_path)
    bank.activate("b")
    before, out = snapshot(bank.model), ZOO[name][1](bank.model)
    with pytest.raises(LoRAError, match=message), bank.rows(["a", "b"]):
        pass
    assert_same(bank.model, before)
    assert torch.equal(ZOO[name][1](bank.model), out)


def test_an_embedding_with_max_norm_is_refused():
    model = trained(embedding(max_norm=1.0).eval(), {"r": 2, "target_modules": ["0"]}, seed=0)
    with (
        pytest.raises(LoRAError, match="adapts an embedding with max_norm at '0'"),
        AdapterBank(model, first="a").rows(["a"]),
    ):
        pass


def test_a_head_that_gives_no_tensor_is_refused_when_it_runs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x), x

    model = nn.Sequential(nn.Linear(4, 4), Pair()).eval()
    chosen = {"r": 2, "target_modules": ["0"], "modules_to_save": ["1"]}
    bank = AdapterBank(trained(model, chosen, seed=0), first="a")
    with bank.rows(["a", None]), pytest.raises(LoRAError, match="'1', saved in full, takes or gives more than one"):
        model(torch.ones(2, 4))


def test_train_mode_is_refused_before_and_within(tmp_path):
    bank = AdapterBank(trained(net(), {"r": 2}, seed=0), first="a")
    with bank.rows(["a", None]):
        bank.model.train()
        with pytest.raises(LoRAError, match="rows: 'up' is in train mode, and rows are for eval"):
            bank.model(inputs())
    with pytest.raises(LoRAError, match="the model is in train mode"), bank.rows(["a", None]):
        pass
    assert bank.active == "a"


def test_dropout_of_a_waiting_adapter_is_off(tmp_path):
    model = trained(net().train(), {"r": 2, "dropout": 0.5}, seed=0)
    bank = AdapterBank(model, first="a")
    bank.activate(None)
    model.eval()
    with bank.rows(["a", "a"]):
        first, second = model(inputs()), model(inputs())
    assert torch.equal(first, second)


def test_an_unbatched_convolution_is_refused():
    make, _, targets = MODELS["Conv1d"]
    bank = AdapterBank(trained(make().eval(), {"r": 2, "target_modules": targets}, seed=0), first="a")
    with (
        bank.rows(["a", "a", None, "a"]),
        pytest.raises(LoRAError, match="is run on its inputs and their mirror image, which failed"),
    ):
        bank.model(torch.randn(4, 6))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a", "z"], {}, "the bank holds no 'z'"),
        ([], {}, "rows must name an adapter or None for every row"),
        ("aa", {}, "rows must name an adapter or None for every row"),
        (["a"], {"repeats": 0}, "repeats must be a whole number of at least 1, got 0"),
    ],
    ids=str,
)
def test_rows_that_mean_nothing_are_refused(names, options, message):
    bank = AdapterBank(trained(net().eval(), {"r": 2}, seed=0), first="a")
    with pytest.raises(LoRAError, match=message), bank.rows(names, **options):
        pass


def test_an_error_within_leaves_the_model_as_it_was():
    model = trained(net(), {"r": 2}, seed=0)
    bank, before = AdapterBank(model, first="a"), snapshot(model)
    with pytest.raises(ZeroDivisionError), bank.rows([None, "a"]):
        raise ZeroDivisionError
    assert_same(model, before)
    with bank.rows(["a"]), pytest.raises(LoRAError, match=r"activate: not within `with bank\.rows"):
        bank.activate(None)


def test_entries_of_rows():
    """Two rows of three entries each, in a row or alternating."""
    assert entries_of([1], 6, 2).tolist() == [3, 4, 5]
    assert entries_of([1, 0], 6, 2).tolist() == [3, 4, 5, 0, 1, 2]
    assert entries_of([1], 6, 2, inner=True).tolist() == [1, 3, 5]


@pytest.mark.fused
def test_torchs_fused_encoder_kernel_does_not_go_past_the_rows():
    """With the kernel allowed, which reads the feed-forward weights itself."""
    model = FAMILIES["encoder"].build(torch.float64)
    bank = AdapterBank(trained(model, {"r": 2, "target_modules": ["linear1"]}, seed=1), first="a")
    x, names = batch_of("encoder", 3), ["a", None, "a"]
    with bank.rows(names):
        got = model(x)
    with torch.no_grad():
        wanted = each_alone(bank, x, names)
        bank.activate(None)
        plain = model(x)
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert [bool((got[i] - plain[i]).abs().max() > 1e-6) for i in range(3)] == [True, False, True]
