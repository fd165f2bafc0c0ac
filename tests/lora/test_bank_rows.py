"""A batch whose rows name their adapters: against each adapter alone on its rows, in float64, and against PEFT."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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

from lora_lightning import AdapterBank, LoRAError, save_adapter
from tests.factories import FAMILIES, assert_same, llama, output, snapshot
from tests.lora.bank_support import ZOO, adapters, base, trained
from tests.lora.kinds import KINDS, embedding, inputs, net


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
        return torch.randint(0, 9, (count, 6), generator=random)
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
    "biases",
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


def attending(batch_first, need_weights):
    model = Attending(batch_first, need_weights).double().eval()
    bank = AdapterBank(trained(model, {"r": 2}, seed=1), first="a")
    bank.activate(None)
    trained(model, {"r": 3, "target_modules": ["attention.out_proj", "linear1"]}, seed=2)
    bank.add("b")
    bank.activate(None)
    trained(model, {"r": 2, "target_modules": ["linear2"], "bias": "all", "modules_to_save": ["attention"]}, seed=3)
    bank.add("c")
    return bank


@pytest.mark.parametrize("length", [2, 3, 6])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_has_its_rows_first(need_weights, length):
    """Also where there are as many positions as rows: torch's modules say where their rows are."""
    bank = attending(True, need_weights)
    x, names = torch.randn(4, length, 8, dtype=torch.float64), ["b", None, "a", "c"]
    with bank.rows(names):
        got = bank.model(x)
    wanted = each_alone(bank, x, names)
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("heads_apart", [True, False])
def test_masks_of_attention_go_with_their_rows(heads_apart):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)]).double().eval()
    bank = AdapterBank(trained(model, {"r": 2}, seed=1), first="a")
    x, padding = torch.randn(3, 3, 8, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.bool)
    padding[1, 2] = padding[2, 0] = True
    mask = torch.randn(6, 3, 3, dtype=torch.float64) if heads_apart else torch.randn(3, 3, dtype=torch.float64)
    names = ["a", None, "a"]
    with bank.rows(names):
        out, weights = model[0](x, x, x, padding.double().masked_fill(padding, -9.0), True, mask)
    for i, name in enumerate(names):
        bank.activate(name)
        own = mask[2 * i : 2 * i + 2] if heads_apart else mask
        one = x[i : i + 1]
        wanted, shares = model[0](one, one, one, padding[i : i + 1].double() * -9.0, True, own)
        torch.testing.assert_close(out[i : i + 1], wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights[i : i + 1], shares, rtol=1e-12, atol=1e-12)


def test_torchs_modules_that_have_their_rows_second_are_refused():
    bank = attending(False, True)
    with pytest.raises(LoRAError, match="rows: 'attention' has batch_first=False"), bank.rows(["a", None]):
        pass


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


def bank_over(model, targets, names="abc"):
    bank = AdapterBank(model.double().eval())
    for seed, name in enumerate(names):
        bank.activate(None)
        trained(bank.model, {"r": 2, "target_modules": targets}, seed=seed)
        bank.add(name)
    return bank


def differs(bank, names, x, run=lambda model, x: model(x)):
    with torch.no_grad():
        wanted = each_alone(bank, x, names, run)
        with bank.rows(names):
            got = run(bank.model, x)
    return float((got - wanted).abs().max() / wanted.abs().max())


class Turned(nn.Module):
    """A linear layer that sees (length, rows, width), or rows and positions flattened into one."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.inner, self.outer = how, nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        if self.how == "flat":
            return self.outer(self.inner(x.flatten(0, 1)).view_as(x).tanh())
        return self.outer(self.inner(x.transpose(0, 1)).tanh().transpose(0, 1))


class Positions(nn.Module):
    """nanoGPT's arange: one vector of positions for all rows, perhaps as many as there are rows."""

    def __init__(self):
        super().__init__()
        self.tokens, self.inner = nn.Linear(8, 4), nn.Embedding(9, 4)

    def forward(self, x):
        return self.tokens(x) + self.inner(torch.arange(x.shape[1]))


class Queries(nn.Module):
    """Learned queries have no rows, though there are as many."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.inner = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.inner(self.queries).mT


class Packed(nn.Module):
    """Rows of different lengths, packed: position 0 of every row, then position 1 of those that have one."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first=True).data)


@pytest.mark.parametrize(
    ("make", "length"),
    [
        *((lambda: Turned("turned"), length) for length in (2, 3, 6)),
        *((lambda: Turned("flat"), length) for length in (2, 3)),
        (Positions, 3),
        (Positions, 5),
        (Queries, 4),
        (Packed, 3),
    ],
    ids=range(9),
)
def test_a_layer_whose_first_dimension_is_not_the_batch_is_named_at_the_first_forward(make, length):
    """Also where the sizes happen to be equal."""
    bank = bank_over(make(), ["inner"])
    for _ in range(2):
        with bank.rows(["b", "a", None]), pytest.raises(LoRAError, match=r"rows: 'inner' sees .* dimension"):
            bank.model(torch.randn(3, length, 8, dtype=torch.float64))


def test_as_many_positions_as_rows_are_refused_until_a_layer_has_shown_its_batch():
    """With no word from the module it could be either; one ordinary batch says it, for as long as the bank lives."""
    bank = AdapterBank(trained(net(torch.float64).eval(), {"r": 2}, seed=1), first="a")
    square, ordinary = torch.randn(3, 3, 12, dtype=torch.float64), torch.randn(3, 5, 12, dtype=torch.float64)
    with (
        bank.rows(["a", None, "a"]),
        pytest.raises(LoRAError, match=r"'up' sees \(3, 3, 12\), .* another length first"),
    ):
        bank.model(square)
    assert differs(bank, ["a", None, "a"], ordinary) < 1e-12
    assert differs(bank, ["a", None, "a"], square) < 1e-12


def test_another_number_of_rows_is_refused():
    bank = AdapterBank(trained(net(torch.float64).eval(), {"r": 2}, seed=1), first="a")
    with bank.rows(["a", None, "a"]), pytest.raises(LoRAError, match=r"'up' sees .* must be that of 3 rows"):
        bank.model(torch.randn(4, 5, 12, dtype=torch.float64))


def test_experts_are_refused_by_name_and_the_attention_beside_them_is_right():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 2}
    sizes |= {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "decoder_start_token_id": 0, "pad_token_id": 0}
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes))
    ids = torch.randint(1, 40, (2, 3))
    bank = bank_over(model, ["q", "v"])
    run = lambda model, x: model(input_ids=x, decoder_input_ids=x).logits  # noqa: E731
    assert differs(bank, ["a", "b"], ids, run) < 1e-12
    bank.activate(None)
    trained(model, {"r": 2, "target_modules": ["wi", "wo"]}, seed=1)
    bank.add("d")
    with pytest.raises(LoRAError, match=r"rows: 'd' adapts an expert, .* at '.*wi'"), bank.rows(["a", "d"]):
        pass


def test_xlnet_lays_positions_first_inside():
    torch.manual_seed(0)
    bank = bank_over(XLNetModel(XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=32)), ["layer_1"])
    for length in (2, 3, 5):
        with bank.rows(["b", "a", None]), pytest.raises(LoRAError, match=r"layer_1' sees .* dimension"):
            bank.model(input_ids=torch.randint(1, 40, (3, length)))


SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
HUB_MODELS = {
    "a head on one position": lambda: RobertaForSequenceClassification(
        RobertaConfig(**SIZES, intermediate_size=24, pad_token_id=1, max_position_embeddings=20)
    ),
    "a scale after the embedding": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, intermediate_size=24, num_key_value_heads=2, head_dim=8)
    ),
}


@pytest.mark.parametrize("name", HUB_MODELS)
def test_models_of_the_hub(name):
    torch.manual_seed(0)
    model = HUB_MODELS[name]()
    chosen = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    chosen += ["embed_tokens"] if "scale" in name else []
    run = lambda model, x: model(x, attention_mask=torch.ones_like(x)).logits  # noqa: E731
    assert differs(bank_over(model, chosen), ["c", "a", None], torch.randint(3, 40, (3, 4)), run) < 1e-12


def swin():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(**sizes)), torch.randn(3, 3, 16, 16, dtype=torch.float64)


def opt():
    sizes = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 20}
    return OPTForCausalLM(OPTConfig(**SIZES, **sizes)), torch.randint(3, 40, (3, 4))


@pytest.mark.parametrize("make", [swin, opt])
def test_windows_and_rows_flattened_with_positions_are_refused(make):
    model, x = make()
    bank = bank_over(model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n])
    with bank.rows(["a", None, "b"]), pytest.raises(LoRAError, match="must be that of 3 rows"):
        bank.model(x)


def test_rows_that_all_have_the_same_adapter_need_no_dimension():
    """Then it does not matter which is which: learned queries have it too."""
    bank = bank_over(Queries(), ["inner"])
    assert differs(bank, ["b", "b"], torch.randn(2, 5, 8, dtype=torch.float64)) < 1e-12
    assert bank.active is None or bank.active == "b"


def test_a_compiled_model_takes_up_the_rows():
    """Compiled before, for the plain base: it is compiled anew within the block, and again after it."""
    model = net(torch.float64).eval()
    bank = AdapterBank(trained(model, {"r": 2}, seed=1), first="a")
    bank.activate(None)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        plain = compiled(x)
        with bank.rows(["a", None, "a"]):
            got = compiled(x)
        assert torch.equal(compiled(x), plain)
    wanted = each_alone(bank, x, ["a", None, "a"])
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert (got[0] - plain[0]).abs().max() > 1e-3


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
        AdapterBank(model, first="a").rows(["a", None]),
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
    with bank.rows(["a", None]), pytest.raises(LoRAError, match="'1' takes or gives more than one tensor"):
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
    bank = AdapterBank(trained(KINDS["Conv1d"].make().eval(), {"r": 2, "target_modules": ["1"]}, seed=0), first="a")
    with (
        bank.rows(["a", "a", None, "a"]),
        pytest.raises(LoRAError, match=r"'1' sees \(4, 6\)"),
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
