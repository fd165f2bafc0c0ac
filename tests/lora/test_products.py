"""Products with W0 by oneDNN: the same numbers to rounding, from W0 as it is now, and only where they are quicker."""

from __future__ import annotations

import copy
import io
import time

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_lightning import LoRAConfig, LoRAError, inject, merge
from lora_lightning.lora import products
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.layers.fused_linear import plain_arithmetic
from lora_lightning.lora.products import frozen_product
from lora_lightning.lora.switches import prepare_weights

pytestmark = pytest.mark.skipif(products._operator() is None, reason="this build of torch has no oneDNN")
WIDTH = 48


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing measured yet, and no product too small."""
    monkeypatch.setattr(products, "_chosen", {})
    monkeypatch.setattr(products, "SMALL", 0)
    products._torch_is_slow.cache_clear()
    yield
    products._torch_is_slow.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways in which oneDNN was called."""
    ways: list[str] = []
    product = products._product
    monkeypatch.setattr(products, "_product", lambda way, *rest: ways.append(way) or product(way, *rest))
    return ways


class Block(nn.Module):
    """Three layers on one input, a layer alone, and one that holds its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 32)
        self.o, self.c = nn.Linear(32, WIDTH), Conv1D(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.o(self.q(x).sigmoid() * self.k(x) + self.v(x)))


def adapted(dropout: float = 0.0, **options: object) -> Block:
    torch.manual_seed(1)
    model = Block()
    inject(model, LoRAConfig(r=3, dropout=dropout, target_modules=".+", **options))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def everything(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, dX and the gradient of every factor."""
    torch.manual_seed(5)
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x * 1.0)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


def far(ours: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, over the largest number of each tensor."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in zip(ours, wanted, strict=True)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 5, WIDTH), (WIDTH,), (1100, WIDTH)])
def test_forced_products_are_float64s_to_float32_rounding(
    shape: tuple[int, ...], dropout: float, taken: list[str]
) -> None:
    model, x = adapted(dropout).train(), torch.randn(shape)
    prepare_weights(model, "on")
    ours = everything(model, x)
    assert len(taken) == 10  # five layers, forward and backward
    wanted = everything(copy.deepcopy(model).double(), x.double())
    assert len(taken) == 10
    assert far(ours, wanted) < 5e-6
    if shape[0] > products.TURNED:
        assert "oneDNN, W0 turned" in taken


def test_bfloat16_gives_the_bits_of_torchs_own(taken: list[str]) -> None:
    model, x = adapted().bfloat16(), torch.randn(70, WIDTH).bfloat16()
    try:
        products._product("oneDNN", x, model.q.weight, None)
    except RuntimeError:
        pytest.skip("no bfloat16 on this CPU")
    prepare_weights(model, "off")
    taken.clear()
    wanted = everything(model, x)
    assert not taken
    prepare_weights(model, "on")
    assert all(torch.equal(a, b) for a, b in zip(everything(model, x), wanted, strict=True))
    assert len(taken) == 10


@pytest.mark.parametrize("prepare", ["off", "auto"])
def test_a_fresh_adapter_changes_no_bit_where_torch_is_taken(prepare: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `auto` because it was measured to be as quick."""
    monkeypatch.setattr(products, "_product", slowed(products._product))
    torch.manual_seed(0)
    model, x = Block(), torch.randn(70, WIDTH)
    wanted = model(x)
    inject(model, LoRAConfig(r=3))
    prepare_weights(model, prepare)  # type: ignore[arg-type]
    assert torch.equal(model(x), wanted)
    assert set(products.choices().values()) == ({"torch"} if prepare == "auto" else set())


def slowed(call):
    return lambda *args: (time.sleep(0.003), call(*args))[1]


def test_what_is_quicker_is_taken_and_said_once_measured(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    monkeypatch.setattr(products, "_torchs", slowed(products._torchs))
    model, x = adapted(), torch.randn(70, WIDTH)
    report = inject(copy.deepcopy(Block()), LoRAConfig(r=2))
    ours = everything(model, x)
    ways = report.products
    assert len(ways) == 7  # forward q and v are alike, backward q, k and v
    assert f"float32 128 x 48 x 32, bias, {torch.get_num_threads()} threads" in ways
    assert f"float32 128 x 32 x 48, W0 by columns, {torch.get_num_threads()} threads" in ways
    assert set(ways.values()) <= {"oneDNN", "oneDNN, W0 turned"}
    taken.clear()
    assert all(torch.equal(a, b) for a, b in zip(everything(model, x), ours, strict=True))
    assert len(taken) == 10  # nothing is measured again
    assert far(ours, everything(copy.deepcopy(model).double(), x.double())) < 2e-5


def test_small_products_and_what_onednn_cannot_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = torch.randn(70, WIDTH), torch.randn(32, WIDTH)
    assert frozen_product(x, W, prepare="on") is not None
    assert frozen_product(x.double(), W.double(), prepare="on") is None
    assert frozen_product(x.to("meta"), W.to("meta"), prepare="on") is None
    assert frozen_product(x.bfloat16(), W, prepare="on") is None
    assert frozen_product(x[:0], W, prepare="on") is None
    assert frozen_product(x, torch.randn(64, 2 * WIDTH)[::2, ::2], prepare="on") is None
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
        assert frozen_product(x, W, prepare="on") is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # oneDNN would take bfloat16 inside
        assert frozen_product(x, W, prepare="on") is None
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(products, "_torchs", slowed(products._torchs))
    monkeypatch.setattr(products, "SMALL", 70 * WIDTH * 32 + 1)
    assert frozen_product(x, W, prepare="auto") is None
    monkeypatch.setattr(products, "SMALL", 70 * WIDTH * 32)
    assert frozen_product(x, W, prepare="auto") is not None
    monkeypatch.setattr(products, "_operator", lambda: None)
    assert frozen_product(x, W, prepare="on") is None


def test_rows_and_weights_may_lie_in_memory_in_any_way() -> None:
    x, W, b = torch.randn(2 * WIDTH, 2 * WIDTH), torch.randn(64, 2 * WIDTH), torch.randn(32)
    rows = [
        x[:70, :WIDTH],
        x[::3, ::2],
        x.t()[:70, :WIDTH],
        x[:1, :WIDTH].expand(70, WIDTH),
        x[:60, :WIDTH].view(4, 15, -1),
    ]
    weights = [W[:32, :WIDTH], W.t().contiguous().t()[:32, :WIDTH], torch.randn(WIDTH, 32).t(), torch.randn(32, WIDTH)]
    for one in rows:
        for weight in weights:
            found = frozen_product(one, weight, b, prepare="on")
            assert found is not None
            assert found.is_contiguous()
            assert far([found], [one.double() @ weight.double().t() + b]) < 5e-6
            onto = torch.randn(found.shape)
            added = frozen_product(one, weight, prepare="on", onto=onto)
            assert added is not None
            assert far([added], [one.double() @ weight.double().t() + onto]) < 5e-6


def test_w0_is_multiplied_as_it_is_now() -> None:
    """Nothing of it is kept: a change in place, through `.data` too, shows at once."""
    model, x = adapted(), torch.randn(1100, WIDTH)
    prepare_weights(model, "on")
    for change in (lambda W: W.mul_(-2.0), lambda W: W.data.add_(1.0)):
        everything(model, x)
        with torch.no_grad():
            change(model.q.weight)
            change(model.c.weight)
        assert far(everything(model, x), everything(copy.deepcopy(model).double(), x.double())) < 2e-5


def test_w0_keys_copies_pickles_and_merge_are_as_without() -> None:
    model, x = adapted(), torch.randn(40, WIDTH)
    before, keys = fingerprint(model), list(model.state_dict())
    places = [p.data_ptr() for p in model.parameters()]
    prepare_weights(model, "on")
    wanted = everything(model, x)
    assert list(model.state_dict()) == keys
    assert not before.differences(fingerprint(model))
    assert [p.data_ptr() for p in model.parameters()] == places
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert twin.q.lora_prepare == "on"
        assert all(torch.equal(a, b) for a, b in zip(everything(twin, x), wanted, strict=True))
    merge(model)
    assert "lora_prepare" not in vars(model.q)
    assert far([model(x).detach()], wanted[:1]) < 1e-5


def test_second_derivatives_checkpointing_and_autocast(taken: list[str]) -> None:
    model, x = adapted(), torch.randn(6, WIDTH)
    prepare_weights(model, "on")

    def second(model: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(x * 1.0).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [x, model.q.lora_A, model.c.lora_B]))

    assert far(second(model, x), second(copy.deepcopy(model).double(), x.double())) < 1e-4
    wanted, forward = everything(model, x), model.forward
    for reentrant in (False, True):
        model.forward = lambda x, r=reentrant: checkpoint(forward, x, use_reentrant=r)  # type: ignore[method-assign]
        assert far(everything(model, x), wanted) < 5e-6
    model.forward = forward  # type: ignore[method-assign]
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        ours = everything(model, x)
        assert taken
        with plain_arithmetic():
            assert far(ours, everything(model, x)) < 4e-2


def test_choices_go_with_a_checkpoint_to_a_machine_of_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = torch.randn(70, WIDTH), torch.randn(32, WIDTH)
    monkeypatch.setattr(products, "_torchs", slowed(products._torchs))
    frozen_product(x, W, prepare="auto")
    saved, chosen = products.saved_choices(), dict(products._chosen)
    assert set(chosen.values()) == {"oneDNN"}
    products._chosen.clear()
    products.take_choices({**saved, "machine": "another"})
    products.take_choices({})
    assert not products._chosen
    products.take_choices(saved)
    assert products._chosen == chosen


def test_measuring_draws_nothing_from_torchs_generator() -> None:
    x, W = torch.randn(70, WIDTH), torch.randn(32, WIDTH)
    before = torch.get_rng_state()
    frozen_product(x, W, prepare="auto")
    assert products._chosen
    assert torch.equal(torch.get_rng_state(), before)


def test_another_word_is_refused() -> None:
    with pytest.raises(LoRAError, match="one of auto, off, on, got 'fast'"):
        prepare_weights(adapted(), "fast")  # type: ignore[arg-type]


def test_under_ddp_the_gradients_are_the_same() -> None:
    import torch.distributed as dist

    model, x = adapted(), torch.randn(40, WIDTH)
    prepare_weights(model, "on")
    wanted = everything(model, x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert all(
            torch.equal(a, b)
            for a, b in zip(everything(nn.parallel.DistributedDataParallel(model), x), wanted, strict=True)
        )
    finally:
        dist.destroy_process_group()
