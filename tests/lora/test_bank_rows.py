"""A batch whose rows name their adapters: against each adapter alone on its rows, in float64, and against PEFT."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lora_lightning import AdapterBank, LoRAError, save_adapter
from tests.factories import FAMILIES, assert_same, hf, llama, output, snapshot
from tests.lora import test_families
from tests.lora.bank_support import ZOO, bank_of, bank_over, run_net, trained
from tests.lora.kinds import KINDS, T5, Mixture, Tied, at, bare, embedding, inputs, net


@torch.no_grad()
def each_alone(bank, names, run):
    outs = {}
    for name in set(names):
        bank.activate(name)
        outs[name] = run(bank.model)
    return torch.stack([outs[name][i] for i, name in enumerate(names)])


def differs(bank, names, run):
    """How far the rows of one batch are from each alone, relative to the largest."""
    with bank.rows(names):
        got = run(bank.model)
    wanted = each_alone(bank, names, run)
    return float((got - wanted).abs().max() / wanted.abs().max())


def check_rows(bank, names, run):
    assert differs(bank, names, run) <= 1e-12
    with bank.rows(names):
        got = run(bank.model)
    bank.activate(None)
    with torch.no_grad():
        plain = run(bank.model)
    different = [bool((a - b).abs().max() > 1e-6) for a, b in zip(got, plain, strict=True)]
    assert different == [name is not None for name in names]


NOT_BY_ROW = {"tokens", "experts", "kdim"}


@pytest.mark.parametrize("name", [name for name in ZOO if name not in NOT_BY_ROW])
def test_every_row_is_as_if_alone_with_its_adapter(name, tmp_path):
    bank, run = bank_of(name, tmp_path), ZOO[name][1]
    bank.activate("a")
    before, count = snapshot(bank.model), len(run(bank.model))
    rows = ["b", None, "a", "b", "a"][:count]
    with bank.rows(rows):
        assert not run(bank.model).requires_grad
        assert bank.active is None
    assert bank.active == "a"
    assert_same(bank.model, before)
    check_rows(bank, rows, run)
    check_rows(bank, ["a", "b", None, "a", "b"][:count], run)


def test_torchs_fused_encoder_kernel_does_not_go_past_the_rows():
    """It reads the feed-forward weights itself."""
    bank = bank_over(FAMILIES["encoder"].build(torch.float64), at("linear1"))
    check_rows(bank, ["a", None], ZOO["encoder"][1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_in_other_dtypes(dtype, tolerance, tmp_path):
    bank = bank_of("linear", tmp_path, dtype)
    assert differs(bank, ["a", "b"], run_net) <= tolerance
    with bank.rows(["a", "b"]):
        assert run_net(bank.model).dtype == dtype


def test_a_head_that_one_saved_and_another_adapts():
    bank = bank_over(net(torch.float64), at("up", modules_to_save=["head"]), at("up", "head"))
    assert differs(bank, ["a", "b"], run_net) < 1e-12


def of(x):
    return lambda model: output(model, x)


class Attending(nn.Module):
    def __init__(self, batch_first, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x):
        return self.layer(self.attention(x, x, x, need_weights=self.need_weights)[0])


@pytest.mark.parametrize("length", [2, 3, 6])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_has_its_rows_first(need_weights, length):
    """Also where there are as many positions as rows: torch's modules say where their rows are."""
    full = at("linear2", bias="all", modules_to_save=["attention"])
    configs, x = [{"r": 2}, at("attention.out_proj", "linear1"), full], torch.randn(4, length, 8, dtype=torch.float64)
    first, second = (bank_over(Attending(b, need_weights).double().eval(), *configs) for b in (True, False))
    assert differs(first, ["b", None, "a", "c"], of(x)) <= 1e-12
    with pytest.raises(LoRAError, match="rows: 'attention' has batch_first=False"):
        differs(second, ["a", None, "c", "c"], of(x))


@pytest.mark.parametrize("heads_apart", [True, False])
def test_masks_of_attention_go_with_their_rows(heads_apart):
    bank = bank_over(nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)]).double().eval(), {"r": 2})
    model, names = bank.model, ["a", None, "a"]
    x, padding = torch.randn(3, 3, 8, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    padding[1, 2] = padding[2, 0] = -9.0
    mask = torch.randn(*[6, 3, 3] if heads_apart else [3, 3], dtype=torch.float64)
    with bank.rows(names):
        out, weights = model[0](x, x, x, padding, True, mask)
    for i, name in enumerate(names):
        bank.activate(name)
        own, one = mask[2 * i : 2 * i + 2] if heads_apart else mask, x[i : i + 1]
        wanted, shares = model[0](one, one, one, padding[i : i + 1], True, own)
        torch.testing.assert_close(out[i : i + 1], wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights[i : i + 1], shares, rtol=1e-12, atol=1e-12)


PAD = {"pad_token_id": 0, "decoder_start_token_id": 0}


@pytest.mark.parametrize("make", [llama, lambda: hf("T5ForConditionalGeneration", **T5, **PAD)], ids=["llama", "t5"])
def test_beams_multiply_rows(make):
    """generate with beams hands 2 rows on for each of ours; T5's encoder sees ours, its decoder the beams."""
    bank = bank_over(make().double().eval(), {"r": 2}, {"r": 4})
    ids, names = torch.randint(1, 40, (3, 4)), ["a", "b", None]

    def generate(rows):
        options = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        return bank.model.generate(rows, attention_mask=torch.ones_like(rows), **options)

    with bank.rows(names, repeats=2):
        got = generate(ids)
    for i, name in enumerate(names):
        bank.activate(name)
        assert torch.equal(got[i : i + 1], generate(ids[i : i + 1]))
    with bank.rows(names), pytest.raises(LoRAError, match="say repeats= where beams or returned sequences multiply it"):
        generate(ids)


def three_on(model, targets):
    return bank_over(model.double().eval(), *[{"r": 2, "target_modules": targets}] * 3)


LEARNED = nn.Parameter(torch.randn(3, 8, dtype=torch.float64))
LAYS = {
    "turned": lambda inner, x: inner(x.transpose(0, 1)),
    "flat": lambda inner, x: inner(x.flatten(0, 1)),
    # nanoGPT's arange: one vector of positions for all rows, perhaps as many as there are rows.
    "positions": lambda inner, x: x + inner(torch.arange(x.shape[1])),
    # Learned queries have no rows, though there are as many.
    "queries": lambda inner, x: x @ inner(LEARNED).mT,
    # Rows of different lengths: position 0 of every row, then position 1 of those that have one.
    "packed": lambda inner, x: inner(pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first=True).data),
}
LAID = [("turned", 2), ("turned", 3), ("turned", 6), ("flat", 2), ("flat", 3)]
LAID += [("positions", 3), ("positions", 5), ("queries", 4), ("packed", 3)]


class Laid(nn.Module):
    def __init__(self, lay):
        super().__init__()
        self.lay, self.inner = LAYS[lay], nn.Embedding(9, 8) if lay == "positions" else nn.Linear(8, 8)

    def forward(self, x):
        return self.lay(self.inner, x)


@pytest.mark.parametrize(("lay", "length"), LAID)
def test_a_layer_whose_first_dimension_is_not_the_batch_is_named_at_the_first_forward(lay, length):
    bank = three_on(Laid(lay), ["inner"])
    for _ in range(2):
        with bank.rows(["b", "a", None]), pytest.raises(LoRAError, match=r"rows: 'inner' sees .* dimension"):
            bank.model(torch.randn(3, length, 8, dtype=torch.float64))


def test_as_many_positions_as_rows_are_refused_until_a_layer_has_shown_its_batch():
    """With no word from the module it could be either; one ordinary batch says it, for as long as the bank lives."""
    bank, rows = bank_over(net(torch.float64), {"r": 2}), ["a", None, "a"]
    square, ordinary, more = (torch.randn(*shape, 12, dtype=torch.float64) for shape in [(3, 3), (3, 5), (4, 5)])
    for x, match in ((square, r"'up' sees \(3, 3, 12\), .* another length first"), (more, "must be that of 3 rows")):
        with bank.rows(rows), pytest.raises(LoRAError, match=match):
            bank.model(x)
    assert differs(bank, rows, of(ordinary)) < 1e-12
    assert differs(bank, rows, of(square)) < 1e-12


def test_experts_are_refused_by_name_and_the_attention_beside_them_is_right():
    sizes = {**T5, "num_layers": 2, "num_decoder_layers": 2, "num_experts": 2, "num_sparse_encoder_layers": 1}
    bank = three_on(hf("SwitchTransformersForConditionalGeneration", **sizes, **PAD), ["q", "v"])
    ids = torch.randint(1, 40, (2, 3))
    assert differs(bank, ["a", "b"], lambda model: model(input_ids=ids, decoder_input_ids=ids).logits) < 1e-12
    bank.activate(None)
    trained(bank.model, {"r": 2, "target_modules": ["wi", "wo"]}, seed=1)
    bank.add("d")
    with pytest.raises(LoRAError, match=r"rows: 'd' adapts an expert, .* at '.*wi'"), bank.rows(["a", "d"]):
        pass


@pytest.mark.parametrize("family", ["roberta", "gemma3 with its embedding"])
def test_a_head_on_one_position_and_a_scaled_embedding_have_the_rows_of_each_adapter(family):
    make, run, fields = test_families.FAMILIES[family]
    bank = three_on(make(), fields.get("target_modules", "all-linear"))
    assert differs(bank, ["c", "a"], run) < 1e-12
    assert differs(bank, [None, "b"], run) < 1e-12


def test_a_compiled_model_takes_up_the_rows():
    """Compiled before, for the plain base: it is compiled anew within the block, and again after it."""
    bank, names = bank_over(net(torch.float64), {"r": 2}), ["a", None]
    bank.activate(None)
    compiled = torch.compile(bank.model, backend="eager")
    with torch.no_grad():
        plain = run_net(compiled)
        with bank.rows(names):
            got = run_net(compiled)
        assert torch.equal(run_net(compiled), plain)
    wanted = each_alone(bank, names, run_net)
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert (got[0] - plain[0]).abs().max() > 1e-3


def test_pefts_mixed_batch_gives_the_same(tmp_path):
    base, names = FAMILIES["bert"].build, ["b", None, "a"]
    bank = AdapterBank(base())
    for letter, r in (("a", 2), ("b", 4)):
        bank.load(letter, save_adapter(trained(base(), {"r": r}, seed=r), tmp_path / letter))
    other = peft.PeftModel.from_pretrained(base(), tmp_path / "a", adapter_name="a").eval()
    other.load_adapter(tmp_path / "b", adapter_name="b")
    x = FAMILIES["bert"].inputs()
    with bank.rows(names):
        got = bank.model(x).logits
    wanted = other(input_ids=x, adapter_names=[name or "__base__" for name in names]).logits
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def pairs():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(Pair(4, 2)))


REFUSED = {
    "token rows": (Tied, at(trainable_token_indices=[1]), None, ["a", None], {}, "'a' trains token rows at 'embed'"),
    "a parameter": (Mixture, bare("up"), None, ["a", None], {}, "rows: 'a' adapts a bare parameter"),
    "max_norm": (lambda: embedding(max_norm=1.0), at("0"), None, ["a", None], {}, "embedding with max_norm at '0'"),
    "no tensor": (
        *(pairs, at("0", modules_to_save=["1"]), torch.ones(2, 4), ["a", None], {}),
        "'1' takes or gives more than one tensor",
    ),
    "unbatched": (KINDS["Conv1d"].make, at("1"), torch.randn(4, 6), ["a", "a", None, "a"], {}, r"'1' sees \(4, 6\)"),
    "a stranger": (net, at("up"), None, ["a", "z"], {}, "the bank holds no 'z'"),
    "no rows": (net, at("up"), None, [], {}, "rows must name an adapter or None for every row"),
    "repeats": (net, at("up"), None, ["a"], {"repeats": 0}, "repeats must be a whole number of at least 1, got 0"),
    "train mode": (lambda: net().train(), at("up"), None, ["a", None], {}, "the model is in train mode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_mean_nothing_are_refused(name):
    make, fields, x, rows, options, message = REFUSED[name]
    bank = bank_over(make() if name == "train mode" else make().eval(), {"r": 2, **fields})
    before = snapshot(bank.model)
    with pytest.raises(LoRAError, match=message), bank.rows(rows, **options):
        bank.model(x)
    assert_same(bank.model, before)
    assert bank.active == "a"


def test_an_error_within_leaves_the_model_as_it_was_and_a_waiting_adapters_dropout_is_off():
    bank = bank_over(net(), {"r": 2, "dropout": 0.5})
    before = snapshot(bank.model)
    with bank.rows(["a", "a"]):
        assert torch.equal(bank.model(inputs()), bank.model(inputs()))
        with pytest.raises(LoRAError, match=r"activate: not within `with bank\.rows"):
            bank.activate(None)
    with bank.rows(["a", None]), pytest.raises(LoRAError, match="rows: 'up' is in train mode, and rows are for eval"):
        bank.model.train()(inputs())
    bank.model.eval()
    with pytest.raises(ZeroDivisionError), bank.rows([None, "a"]):
        raise ZeroDivisionError
    assert_same(bank.model, before)
