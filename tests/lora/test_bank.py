"""Several adapters on one base: held beside the layers, one in the model at a time; and how strong one is."""

import copy
import inspect

import pytest
import torch
from torch import nn

from lora_lightning import AdapterBank, LoRAConfig, LoRAError, inject, load_adapter, merge, remove, save_adapter
from lora_lightning.lora.bank.detached import Share
from lora_lightning.lora.bank.strength import scaled
from lora_lightning.lora.errors import AdapterError, AdapterWarning
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors
from tests.factories import FAMILIES, assert_same, snapshot
from tests.lora.bank_support import ZOO, alone, bank_of, bank_over, base, run_net, trained
from tests.lora.directories import same_files
from tests.lora.kinds import net, shake


@pytest.fixture
def bank(tmp_path):
    return bank_of("linear", tmp_path)


ANY = [(kind, torch.float64) for kind in ZOO] + [(kind, torch.bfloat16) for kind in ZOO.keys() - FAMILIES.keys()]


@pytest.mark.parametrize(("kind", "dtype"), sorted(ANY, key=str))
def test_any_adapter_follows_any_other_as_if_it_were_the_only_one(kind, dtype, tmp_path):
    """Of other rank, targets and options: the same output to the bit, keys, trained tensors, files and merged model."""
    bank, run = bank_of(kind, tmp_path, dtype), ZOO[kind][1]
    plain, places = run(bank.model), {n: t.data_ptr() for n, t in bank.model.state_dict().items()}
    before, w0 = snapshot(bank.model), fingerprint(bank.model).digest
    singles = {letter: alone(kind, tmp_path / letter, dtype) for letter in bank.names}
    for letter in [*bank.names, *reversed(bank.names), None, bank.names[0]]:
        bank.activate(letter)
        assert bank.active == letter
        out, state = run(bank.model), bank.model.state_dict()
        assert all(state[name].data_ptr() == place for name, place in places.items()), "W0 stays in its place"
        if letter is None:
            assert torch.equal(out, plain)
            assert_same(bank.model, before)
            assert fingerprint(bank.model).digest == w0
        else:
            assert torch.equal(out, run(singles[letter]))
            assert not torch.equal(out, plain)
            assert_same(bank.model, snapshot(singles[letter]), but=("attributes",))
    for letter, single in singles.items():
        assert same_files(bank.save(letter, tmp_path / "held"), save_adapter(single, tmp_path / "own"))
    merge(bank.model)
    merge(singles["a"])
    assert_same(bank.model, snapshot(singles["a"]), but=("attributes",))


def test_a_copied_bank_is_one_over_its_own_model(bank):
    twin = copy.deepcopy(bank)
    for one in (bank, twin):
        one.activate("b")
    assert torch.equal(run_net(twin.model), run_net(bank.model))
    assert not {*twin.model.parameters()} & {*bank.model.parameters()}


def step(model, optimizer, batch):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("fields", [{"r": 2}, {"use_dora": True, "bias": "all", "modules_to_save": ["head"]}], ids=str)
def test_training_goes_on_where_it_stopped(fields, tmp_path):
    """With the same optimizer: what it holds are the same objects after another adapter was active and trained."""
    batches = [torch.randn(4, 12, dtype=torch.float64) for _ in range(4)]
    models = [trained(net(torch.float64), fields, seed=1) for _ in range(2)]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    bank = AdapterBank(models[0], first="mine")
    for i, batch in enumerate(batches):
        step(models[0], optimizers[0], batch)
        step(models[1], optimizers[1], batch)
        if i == 1:
            optimizers[0].zero_grad()
            bank.activate(None)
            trained(bank.model, {"r": 1}, seed=3)
            bank.add("other")
            other = torch.optim.SGD([p for p in bank.model.parameters() if p.requires_grad], lr=0.1)
            step(bank.model, other, batch)
            bank.activate("mine")
    assert_same(models[0], snapshot(models[1]), but=("attributes",))


def nbytes(model, *held):
    tensors = [*model.parameters(), *model.buffers(), *held]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_activate_draws_allocates_and_copies_nothing(tmp_path):
    bank, w0 = bank_of("bert", tmp_path), nbytes(base("bert"))
    state, places = torch.get_rng_state(), {}
    tensors = {letter: {t for share in held for t in share.tensors()} for letter, held in bank._held.items()}
    own = {letter: sum(t.nbytes for t in held) for letter, held in tensors.items()}
    for letter in (None, "a", "b", "a", "b"):
        bank.activate(letter)
        held = [tensor for held in bank._held.values() for share in held for tensor in share.tensors()]
        assert nbytes(bank.model, *held) == w0 + sum(own.values())
        assert nbytes(bank.model) == w0 + own.get(letter, 0)
        ids = {n: (id(p), p.data_ptr()) for n, p in bank.model.named_parameters()}
        assert places.setdefault(letter, ids) == ids
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_and_dtypes_are_those_of_the_modules_when_activated(tmp_path):
    bank = bank_over(net(), {"dropout": 0.5, "modules_to_save": ["norm"]})
    for train in (True, False):
        bank.activate(None)
        bank.model.train(train)
        bank.activate("a")
        assert all(module.training == train for module in bank.model.modules())
    bank = bank_of("linear", tmp_path, torch.float32)
    bank.model.bfloat16()
    bank.activate("a")
    assert bank.model.up.lora_A.dtype == torch.float32
    assert torch.isfinite(run_net(bank.model)).all()


def test_disabled_is_the_plain_base_and_keeps_its_statistics(tmp_path):
    bank, run = bank_of("normed", tmp_path), ZOO["normed"][1]
    plain = run(bank.model)
    bank.activate("a")
    adapted = run(bank.model)
    with bank.disabled():
        for train in (False, True, False):
            bank.model.train(train)
            assert torch.equal(run(bank.model), plain)
        with pytest.raises(LoRAError, match=r"activate: not within `with bank.disabled"):
            bank.activate("b")
    assert torch.equal(run(bank.model), adapted)


def test_what_was_taken_out_by_hand_is_held_and_a_stranger_in_the_model_is_not_lost(bank):
    bank.activate("a")
    first = run_net(bank.model)
    remove(bank.model)
    assert bank.active is None
    bank.activate("a")
    assert torch.equal(run_net(bank.model), first)
    remove(bank.model)
    trained(bank.model, {"r": 2}, seed=9)
    out = run_net(bank.model)
    for name in ("a", "b", None):
        with pytest.raises(AdapterError, match=r"has an adapter that the bank does not hold: bank.add\(name\)"):
            bank.activate(name)
    assert torch.equal(run_net(bank.model), out)
    bank.add("new")
    bank.activate("a")
    bank.activate("new")
    assert torch.equal(run_net(bank.model), out)


def test_another_base_is_refused_and_the_bank_stays_as_it_was(bank, tmp_path):
    bank.activate("b")
    before = snapshot(bank.model)
    save_adapter(trained(net(torch.float64, seed=5), {"r": 2}, seed=0), tmp_path / "other")
    with pytest.raises(AdapterError, match="another base"):
        bank.load("c", tmp_path / "other")
    assert (bank.names, bank.active) == (["a", "b"], "b")
    assert_same(bank.model, before)
    with pytest.warns(AdapterWarning, match="allow_other_base"):
        bank.load("c", tmp_path / "other", allow_other_base=True)
    assert bank.active == "b"


@pytest.mark.parametrize("active", ["a", None])
def test_an_activate_that_fails_changes_nothing(active, bank, monkeypatch):
    """A module replaced by another whose tensors are the same, and a device without room for the second layer."""
    bank.activate(active)
    before = snapshot(bank.model)
    moves, move = [], Share.move

    def no_room(share, device):
        moves.append(share)
        if len(moves) == 2:
            raise torch.OutOfMemoryError("no room")
        move(share, device)

    monkeypatch.setattr(Share, "move", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        bank.activate("b")
    monkeypatch.undo()
    assert bank.active == active
    assert_same(bank.model, before)
    bank.activate("b")
    bank.activate(None)
    plain = bank.model.up
    bank.model.up = copy.copy(plain)
    bank.model.up.__dict__["_parameters"] = plain._parameters
    with pytest.raises(AdapterError, match="'up' is not the module that the adapter belongs to"):
        bank.activate("a")
    assert bank.active is None


class Watched(nn.Module):
    """A frozen part whose name holds `lora_`, and statistics."""

    def __init__(self):
        super().__init__()
        self.flora_net, self.lin, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.lin(self.flora_net(x)))


MOVES = [
    (lambda m: m.flora_net.weight.add_(1), r"flora_net\.weight"),
    (lambda m: m.norm.running_mean.add_(1), r"norm\.running_mean"),
    (lambda m: setattr(m.norm, "running_var", torch.full((4,), 2.0)), r"norm\.running_var"),
    (lambda m: setattr(m.flora_net, "weight", nn.Parameter(m.flora_net.weight.clone())), r"flora_net\.weight"),
    (lambda m: setattr(m, "lin", nn.Linear(4, 4)), r"lin\.weight"),
    (lambda m: m.norm.train()(torch.randn(3, 4)), r"norm\.num_batches_tracked"),
]


@pytest.mark.parametrize(("move", "named"), MOVES)
def test_whatever_moved_of_the_base_is_named(move, named):
    """Also by a forward in train mode, while no adapter freezes the statistics."""
    bank = bank_over(Watched(), {"r": 2, "target_modules": ["lin"]})
    bank.activate(None)
    with torch.no_grad():
        move(bank.model)
    with pytest.raises(AdapterError, match=f"W0 moved since the bank was made, first '{named}'"):
        bank.activate("a")


def test_a_bank_ends_with_a_merge(bank, tmp_path):
    bank.activate("a")
    merge(bank.model)
    calls = [lambda: bank.activate("b"), lambda: bank.load("c", tmp_path / "b"), lambda: bank.combine("c", {"b": 1})]
    for call in calls:
        with pytest.raises(AdapterError, match="a merge is the end"):
            call()


def test_save_and_load_take_what_the_functions_take(bank, tmp_path):
    bank.activate("a")
    settings = {"base_model_name_or_path": "hub/name", "task_type": "SEQ_CLS", "serving": "vllm"}
    wanted = save_adapter(bank.model, tmp_path / "function", **settings)
    bank.activate(None)
    assert same_files(bank.save("a", tmp_path / "bank", **settings), wanted)
    for ours, theirs in ((AdapterBank.save, save_adapter), (AdapterBank.load, load_adapter)):
        taken, given = (set(inspect.signature(f).parameters) for f in (theirs, ours))
        assert taken - {"model"} == given - {"self", "name"}
    bank.model.eval()
    with bank.rows(["a"]), pytest.raises(LoRAError, match=r"save: not within `with bank.rows"):
        bank.save("a", tmp_path / "within")


def test_remove_forgets(bank):
    plain = run_net(bank.model)
    bank.activate("a")
    bank.remove("a")
    assert (bank.names, bank.active, "a" in bank, len(bank)) == (["b"], None, False, 1)
    assert torch.equal(run_net(bank.model), plain)
    with pytest.raises(LoRAError, match="the bank holds no 'a'"):
        bank.remove("a")
    bank.activate("b")
    assert repr(bank).startswith("AdapterBank(b (")


WRONG_NAMES = [
    (lambda bank, d: bank.activate("poat"), "the bank holds no 'poat', it has poet, b; did you mean 'poet'"),
    (lambda bank, d: bank.load("poet", d), "the bank holds 'poet' already"),
    (lambda bank, d: bank.load("", d), "an adapter's name must be a text, got ''"),
    (lambda bank, d: bank.add("new"), "the model's adapter is held already, as 'poet'"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_NAMES)
def test_a_wrong_name_is_one_clear_error(call, message, tmp_path):
    bank = AdapterBank(trained(net(), {"r": 2}, seed=0), first="poet")
    save_adapter(bank.model, tmp_path)
    bank.load("b", tmp_path)
    with pytest.raises(LoRAError, match=message):
        call(bank, tmp_path)
    assert (bank.names, bank.active) == (["poet", "b"], "poet")


def test_a_compiled_wrapper_is_seen_through_and_add_needs_an_adapter():
    bank = AdapterBank(torch.compile(net(), backend="eager"))
    assert type(bank.model) is type(net())
    with pytest.raises(LoRAError, match="the model has no adapter to add"):
        bank.add("a")
    inject(bank.model, LoRAConfig(r=2))
    bank.add("a")
    assert bank.active == "a"


def test_adapters_wait_where_they_are_asked_to():
    """The meta device stands in for another one; the base and the active adapter stay."""
    bank = AdapterBank(trained(net(), {"r": 2, "modules_to_save": ["head"], "init": "pissa"}, seed=0), device="meta")
    active = bank.model.up.lora_A
    assert not active.is_meta
    bank.activate(None)
    waiting = [tensor for share in bank._held["default"] for tensor in share.tensors()]
    assert all(tensor.is_meta for tensor in waiting)
    assert {tensor.shape for tensor in waiting} >= {active.shape, bank.model.head.weight.shape}
    assert not any(tensor.is_meta for tensor in bank.model.state_dict().values())


# The strength of an update. That 0 is the base and 1 the adapter is in `laws.check_strength`, for every kind of layer,
# option and dtype; that PEFT computes the same at any strength is in `laws.check_peft_opens_ours`.


def of_strength(**fields):
    model = net(torch.float64)
    inject(model, LoRAConfig(r=3, alpha=7, target_modules=["up", "down", "square"], **fields))
    return shake(model)


def test_a_head_and_its_tied_copy_are_scaled_once():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    model["second"].weight = model["first"].weight
    inject(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["first", "second"]))
    first, second = shake(model)["first"], model["second"]
    own, trained = first.weight.clone(), first.lora_copy.weight.clone()
    with scaled(model, 0.5):
        assert first.lora_copy.weight is second.lora_copy.weight
        torch.testing.assert_close(first.lora_copy.weight, (own + trained) / 2)


def test_a_fit_goes_on_where_it_was_after_an_error_within_and_after_a_merge_that_is_refused():
    model = of_strength(use_dora=True, modules_to_save=["head"])
    before = {key: tensor.clone() for key, tensor in adapter_tensors(model).items()}
    settings = [m.lora_settings for m in model.modules() if hasattr(m, "lora_settings")]
    with pytest.raises(RuntimeError, match="within"), scaled(model, 0.5):
        raise RuntimeError("within")
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_tensors(model).items())
    for wrong in (-0.5, float("nan"), float("inf"), True, "half"):
        with pytest.raises(LoRAError, match="finite number of at least 0"):
            merge(model, scale=wrong)
    with torch.no_grad():
        model.up.lora_B[0, 0] = float("nan")
    with pytest.raises(LoRAError):
        merge(model, scale=0.5)
    assert settings == [m.lora_settings for m in model.modules() if hasattr(m, "lora_settings")]


def test_a_dora_channel_without_w0_has_no_form_and_is_refused():
    model = of_strength(use_dora=True)
    with torch.no_grad():
        model.up.lora_magnitude_vector[0] = model.up.updated_norms()[0] / 2  # its factor is 1/2: 1 + 2 (1/2 - 1) = 0
    with pytest.raises(LoRAError, match="without W0"), scaled(model, 2.0):
        pass
