import collections
import copy
import warnings

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, merge
from lora_lightning.lora.errors import AdapterWarning, MergeError
from tests.factories import Own, assert_same, distance, move, sequential, snapshot

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_a_merge_that_erases_more_than_a_tenth_of_an_update_names_the_layer(dtype, size):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    inject(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    move(model[0], size)
    move(model[1], 1.0)
    wide, name = copy.deepcopy(model), str(dtype).removeprefix("torch.")
    lost = rf"rounding to {name} kept less than 90% .* in 1 of 2 layers, least in 0 "
    with pytest.warns(AdapterWarning, match=lost) as said:
        report = merge(model, dtype=dtype)
    assert len(said) == 1
    assert report.kept["0"] < 0.9 < report.kept["1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(wide)


@pytest.mark.parametrize("target", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("own", [torch.float32, *HALF], ids=str)
def test_a_merge_rounds_the_exact_sum_once_and_reports_what_it_lost(own, target):
    model = sequential().to(own)
    model.register_buffer("kept", torch.ones(1, dtype=own))
    model.register_buffer("left", torch.ones(1, dtype=own), persistent=False)
    inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["4"]))
    move(model, 0.02)
    update = (2 * model[0].lora_B.double() @ model[0].lora_A.double()).detach()
    sums = {"0.weight": model[0].weight.double() + update, "2.weight": model[2].weight.double()}
    sums["4.weight"] = model[4].lora_copy.weight.detach().double()
    report = merge(model, dtype=target)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {target}
    assert model.left.dtype == own, "no file holds it"
    unit = torch.finfo(target).eps / 2
    for key, wanted in sums.items():
        torch.testing.assert_close(state[key].double(), wanted.detach(), rtol=1.001 * unit, atol=1e-7)
    lost = float((state["0.weight"].double() - sums["0.weight"]).norm() / update.norm())
    assert report.kept["0"] == pytest.approx(1 - lost, abs=1e-5)
    assert (report.kept["0"] > 0.9999) == (target == torch.float32)
    assert report.kept["0"] > 0.3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_a_quantized_weight_is_not_merged_into(dtype):
    model = sequential()
    inject(model, LoRAConfig(r=2, target_modules=["0", "2"]))
    model[2].weight = nn.Parameter(torch.ones(12, 16).to(dtype), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(MergeError, match=f"'2' holds its weight as {dtype}"):
        merge(model)
    assert_same(model, before, but=("state",))


def merged_as_adapted(model, x, tolerance=1e-5):
    adapted = move(model).eval()(x)
    merge(model)
    assert distance(model(x), adapted) < tolerance


def test_a_head_in_two_places_stays_one():
    model = Own()
    model.inner["head"] = model.head
    inject(model, LoRAConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    merged_as_adapted(model, torch.randn(3, 8))
    assert model.inner["head"] is model.head


def test_a_tie_and_buffers_of_a_head_come_along():
    head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))
    head[3].weight = head[0].weight
    model = nn.Sequential(nn.Linear(8, 8), head)
    inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    model(torch.randn(16, 8) + 3)
    merged_as_adapted(model, torch.randn(3, 8))
    assert head[3].weight is head[0].weight
    assert int(head[1].num_batches_tracked) == 1


BEYOND = {
    "module saved in full": ({"modules_to_save": ["head"]}, "head.lora_copy.weight", r"'head\.weight'"),
    "bias that trains": ({"bias": "lora_only"}, "lin.lora_trained_bias", r"'lin\.bias'"),
    "B's bias": ({"lora_bias": True}, "lin.lora_B_bias", "the bias of 'lin' with lora_bias"),
    "token's row": ({"trainable_token_indices": {"emb": [1]}}, "emb.lora_tokens", r"'emb\.weight'"),
    "update": ({}, "lin.lora_B", "W0 . s B A of 'lin'"),
    "W0": ({}, "head.weight", r"'head\.weight'"),
}


OF_HALF = [(what, torch.float16, None) for what in BEYOND if what != "W0"]  # whose own is infinite then


@pytest.mark.parametrize(("what", "own", "dtype"), OF_HALF + [(what, torch.float32, torch.float16) for what in BEYOND])
def test_no_number_becomes_infinite_and_the_model_stays_as_it_was(what, own, dtype):
    """Of those that train and of W0, where an infinity that was there hides no number that becomes one."""
    options, where, said = BEYOND[what]
    parts = {"emb": nn.Embedding(10, 8), "lin": nn.Linear(8, 8), "head": nn.Linear(8, 4)}
    model = nn.Sequential(collections.OrderedDict(parts)).to(own)
    inject(model, LoRAConfig(target_modules=["lin"], r=2, **options))
    with torch.no_grad():
        model.emb.weight[0, 0] = float("-inf")
        model.lin.lora_A.fill_(1.0)
        model.get_parameter(where).view(-1)[0] = 2e5
    before = snapshot(model)
    with pytest.raises(MergeError, match=f"{said} is larger than float16 can hold"):
        merge(model, dtype=dtype)
    assert_same(model, before)
    merge(model, dtype=torch.bfloat16)
    assert sum(int(tensor.isinf().sum()) for tensor in model.state_dict().values()) == 1


BEYOND_WIDE = [
    # (A, B, W0, words): what rounds to bfloat16 ends at 3.396e38, float32 at 3.403e38
    (3.4e38 / 2 / 1.5e19, 1.5e19, 0.0, "larger than bfloat16"),
    (1e20, 1e20, 0.0, "s B A of '2' is not finite"),
    (0.0, 0.0, torch.finfo(torch.float32).max, r"'2\.weight' is larger than bfloat16 can hold: merge into"),
]


@pytest.mark.parametrize(("a", "b", "w0", "said"), BEYOND_WIDE)
def test_what_is_beyond_the_wide_dtypes_is_refused_before_anything_changes(a, b, w0, said):
    model = sequential()
    inject(model, LoRAConfig(r=1, target_modules=["0", "2"]))
    with torch.no_grad():
        model[2].lora_A.fill_(a)
        model[2].lora_B[0] = b
        model[2].weight[0, 1] = w0
        model[0].lora_B.fill_(0.1)
    before = snapshot(model)
    with pytest.raises(MergeError, match=said):
        merge(model, dtype=torch.bfloat16)
    with pytest.raises(MergeError, match="not int8"):
        merge(model, dtype=torch.int8)
    assert_same(model, before)


def test_a_model_without_values_is_not_merged():
    with torch.device("meta"):
        model = sequential()
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(MergeError, match=r"on the meta device.*give it its weights first"):
        merge(model)


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.t()])
@pytest.mark.parametrize("targets", [["0"], ["0", "2"]])
def test_weights_that_share_memory_as_two_parameters_are_merged_apart(view, targets):
    """`b.weight.data = a.weight.data`, an old way to tie; and a second model that was given the same tensors."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double(), torch.randn(3, 8).double()
    other = copy.deepcopy(model)
    model[2].weight.data = view(model[0].weight.data)
    other.load_state_dict(model.state_dict(), assign=True)
    untouched = other(x)
    inject(model, LoRAConfig(r=2, target_modules=targets))
    merged_as_adapted(model, x, 1e-12)
    assert torch.equal(other(x), untouched)
