"""Inputs computed anew: the same gradients bit for bit, and in memory little beyond the frozen step's."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import kept_bytes
from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.replay import Replays, _same_bits
from lora_lightning.lora.switches import recompute_inputs

ROWS, WIDTH, R, LAYERS = 96, 32, 2, 2


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=8, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2)
    config.intermediate_size = 4 * WIDTH
    return BertModel(config, add_pooling_layer=False)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=8, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2)
    config.num_key_value_heads, config.intermediate_size = 1, 80
    return LlamaModel(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=20, patch_size=4)
    config.intermediate_size, config.num_channels = 4 * WIDTH, 1
    return ViTModel(config, add_pooling_layer=False)


def embeddings(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x).last_hidden_state


def patches(model: nn.Module, x: Tensor) -> Tensor:
    """ViT takes images; what its blocks do to embeddings is what counts here."""
    for layer in model.layers:
        x = layer(x)
    return model.layernorm(x)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], int, int]] = {
    "bert": (bert, embeddings, 6, 3),
    "llama": (llama, embeddings, 11, 3),
    "vit": (vit, patches, 10, 3),
}
"""With the factors A that see x in a layer, in vain or not, and the inputs that are computed anew there."""


def pair(make: Callable[[], nn.Module], dtype: torch.dtype, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """A frozen model and its adapted copy."""
    torch.manual_seed(0)
    frozen = make().to(dtype).eval().requires_grad_(False)
    return frozen, adapted(copy.deepcopy(frozen), dropout)


def adapted(model: nn.Module, dropout: float = 0.0, target_modules: Any = "all-linear") -> nn.Module:
    inject(model, LoRAConfig(r=R, dropout=dropout, target_modules=target_modules))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    for name, module in model.named_modules():
        module.train("lora_dropout" in name)
    return model


def inputs(dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, ROWS // 4, WIDTH).to(dtype).requires_grad_()


def grads(model: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor] = embeddings) -> list[Tensor]:
    """dX and the gradients of all factors."""
    torch.manual_seed(2)
    model.zero_grad()
    x.grad = None
    run(model, x).float().square().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bits_and_nothing_but_rank_sized_numbers_is_kept(
    family: str, dropout: float, dtype: torch.dtype
) -> None:
    make, run, factors, inputs_anew = FAMILIES[family]
    frozen, model = pair(make, dtype, dropout)
    x = inputs(dtype)
    wanted, before = grads(model, x, run), kept_bytes(model, lambda: run(model, x))
    recompute_inputs(model)
    assert same(grads(model, x, run), wanted)
    limit = kept_bytes(frozen, lambda: run(frozen, x))
    kept = kept_bytes(model, lambda: run(model, x))
    size, rank_sized = dtype.itemsize, LAYERS * factors * R * ROWS
    assert kept == limit + size * (rank_sized + LAYERS * inputs_anew)  # for each such input, one zero
    assert before > 1.25 * limit
    recompute_inputs(model, False)
    assert kept_bytes(model, lambda: run(model, x)) == before


class Own(nn.Module):
    """A producer of one's own, and two layers that read what it gives."""

    def __init__(self, produce: Callable[[Own, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.produce = produce

    def forward(self, x: Tensor) -> Tensor:
        y = self.produce(self, x)
        return self.first(y) * self.second(y)


def own(produce: Callable[[Own, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> tuple[Own, Replays]:
    torch.manual_seed(0)
    model = Own(produce).to(dtype)
    nn.init.normal_(model.norm.weight)
    adapted(model, target_modules=["first", "second"])
    recompute_inputs(model)
    return model, model.first.lora_replays


def call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x * 1.5)


def tanh_form(x: Tensor) -> Tensor:
    """As transformers writes it out."""
    return 0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.044715 * torch.pow(x, 3.0))))


PRODUCERS: dict[str, Callable[[Own, Tensor], Tensor]] = {
    "layer norm": lambda own, x: own.norm(x),
    "torch's RMS norm": lambda own, x: own.rms(x),
    "GELU": lambda own, x: F.gelu(x),
    "GELU, tanh": lambda own, x: F.gelu(x, approximate="tanh"),
    "GELU, written out": lambda own, x: tanh_form(x),
    "SiLU": lambda own, x: F.silu(x),
    "SwiGLU": lambda own, x: F.silu(x) * (x + 1.0),
    "GELU and dropout": lambda own, x: F.dropout(F.gelu(x), 0.2),
    "a view of a norm": lambda own, x: own.norm(x).view(-1, WIDTH),
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_cheap_producers_are_known(name: str) -> None:
    model, replays = own(PRODUCERS[name])
    x = inputs(torch.float32)
    ours = grads(model, x, call)
    assert set(replays.proven.values()) == {True}
    recompute_inputs(model, False)
    assert same(ours, grads(model, x, call))


OTHERS: dict[str, Callable[[Own, Tensor], Tensor]] = {
    "a sum": lambda own, x: x + 1.0,
    "ReLU": lambda own, x: F.relu(x),
    "a product of matrices": lambda own, x: x @ own.norm.weight.diag(),
    "a norm without a module": lambda own, x: F.layer_norm(x, (WIDTH,), torch.ones(WIDTH)),
    "a norm of another epsilon": lambda own, x: F.layer_norm(x, (WIDTH,), own.norm.weight, own.norm.bias, 0.1),
    "changed in place": lambda own, x: F.gelu(x).mul_(2.0),
    "changed past autograd": lambda own, x: changed(F.gelu(x)),
    "an unknown function": lambda own, x: F.mish(x),
    "turned": lambda own, x: F.gelu(x.transpose(0, 1)),
}


def changed(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.clamp_(max=0.5)
    return x


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_is_kept_as_ever(name: str) -> None:
    model, replays = own(OTHERS[name])
    x = inputs(torch.float32)
    ours = grads(model, x, call)
    assert True not in replays.proven.values()
    recompute_inputs(model, False)
    assert same(ours, grads(model, x, call))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_norm_called_with_another_epsilon_once_it_was_proven_gives_its_own_gradients(
    dtype: torch.dtype, limit: float
) -> None:
    epsilons: list[float] = []
    model, replays = own(lambda o, x: F.layer_norm(x, (WIDTH,), o.norm.weight, o.norm.bias, epsilons[-1]), dtype)
    x = inputs(dtype)
    epsilons.append(model.norm.eps)
    proven = grads(model, x, call)
    assert set(replays.proven.values()) == {True}
    epsilons.append(0.5)
    ours = grads(model, x, call)
    recompute_inputs(model, False)
    wanted = grads(model, x, call)
    for one, other in zip(ours, wanted, strict=True):
        assert float((one - other).abs().max()) <= limit * float(other.abs().max())
    assert not same(proven, wanted)


def test_under_autocast_the_cast_is_made_again() -> None:
    _, model = pair(bert, torch.float32)
    x = inputs(torch.float32)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return embeddings(model, x)

    wanted, before = grads(model, x, run), kept_bytes(model, lambda: run(model, x))
    recompute_inputs(model)
    assert same(grads(model, x, run), wanted)
    anew = ROWS * WIDTH * 2 * (1 + 1 + 4) * LAYERS  # q, k and v's input, the intermediate's and the output's
    assert kept_bytes(model, lambda: run(model, x)) == before - anew + 2 * 3 * LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same(reentrant: bool) -> None:
    """Around everything, and around the producer alone, whose inputs are then not there to be read."""
    model, _ = own(PRODUCERS["layer norm"])
    x = inputs(torch.float32)
    forwards: list[int] = []
    model.norm.register_forward_pre_hook(lambda *args: forwards.append(1))
    whole = lambda model, x: checkpoint(model, x * 1.5, use_reentrant=reentrant)  # noqa: E731
    ours = grads(model, x, whole)
    model.produce = lambda own, x: checkpoint(own.norm, x, use_reentrant=reentrant)
    apart = grads(model, x, call)
    assert len(forwards) == 4
    recompute_inputs(model, False)
    assert same(apart, grads(model, x, call))
    model.produce = PRODUCERS["layer norm"]
    assert same(ours, grads(model, x, whole))


def test_hooks_on_saved_tensors_see_the_input_as_ever() -> None:
    model, replays = own(PRODUCERS["GELU"])
    x = inputs(torch.float32)
    wanted = grads(model, x, call)
    replays.proven.clear()

    def offloaded(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return call(model, x)

    assert same(grads(model, x, offloaded), wanted)
    assert not replays.proven

    def partly(model: Own, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            y = F.gelu(x * 1.5)
        return model.first(y) * model.second(y)

    assert same(grads(model, x, partly), wanted)
    assert not replays.proven


def test_second_derivatives_also_by_the_input_itself() -> None:
    model, _ = own(PRODUCERS["layer norm"], torch.float64)
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return model(x * 1.5).square().sum() * 1e-2

    assert torch.autograd.gradgradcheck(loss, x, atol=1e-6)

    def by_middle(on: bool) -> list[Tensor]:
        recompute_inputs(model, on)
        middle = model.norm(x * 1.5)
        out = (model.first(middle) * model.second(middle)).square().sum()
        A = model.first.lora_A
        (dA,) = torch.autograd.grad(out, A, create_graph=True)
        return list(torch.autograd.grad(dA.square().sum(), [middle, x, A, model.second.lora_B]))

    for a, b in zip(by_middle(on=True), by_middle(on=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_changed_in_the_meantime_raises_in_torchs_words() -> None:
    model, _ = own(lambda own, x: F.gelu(x))
    x = inputs(torch.float32)
    middle = x * 1.5
    out = model(middle)
    middle.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_output_of_a_producer_may_change_in_place_later() -> None:
    """Keeping x would forbid it: the layer's x is what it was."""
    model, _ = own(lambda own, x: F.gelu(x))
    x = inputs(torch.float32)

    def run(model: Own, x: Tensor) -> Tensor:
        y = F.gelu(x * 1.5)
        out = model.first(y) * model.second(y)
        return out + y.add_(1.0).sum()

    ours = grads(model, x, run)
    recompute_inputs(model, False)
    without = grads(model, x, lambda model, x: call(model, x) + (F.gelu(x * 1.5) + 1.0).sum())
    for a, b in zip(ours, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_graph_is_freed_without_a_collection() -> None:
    """No reference goes in a circle, whether backward runs or not."""
    model, _ = own(PRODUCERS["layer norm"])
    x = inputs(torch.float32)
    grads(model, x, call)
    gc.collect()
    gc.disable()
    try:
        for goes_backward in (True, False):
            middle = x * 1.5
            seen, storage = weakref.ref(middle), weakref.ref(middle.untyped_storage())
            out = model(middle)
            if goes_backward:
                out.sum().backward()
            del middle, out
            assert seen() is None
            assert storage() is None
            with torch.no_grad():
                model(x)  # closes what was open to siblings
            assert nothing_is_left(model, x)
    finally:
        gc.enable()


def nothing_is_left(model: nn.Module, x: Tensor) -> bool:
    """Bytes after a step are those before, the gradients being there already."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
        call(model, x).square().sum().backward()
    return sum(event.self_cpu_memory_usage for event in profile.function_events) == 0


def test_backward_twice_with_and_without_retain_graph() -> None:
    model, _ = own(PRODUCERS["layer norm"])
    x = inputs(torch.float32)
    out = call(model, x).sum()
    A = model.first.lora_A
    (first,) = torch.autograd.grad(out, A, retain_graph=True)
    (second,) = torch.autograd.grad(out, A)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, A)


def test_copies_and_pickles_compute_anew_too_and_a_layer_alone_keeps() -> None:
    _, model = pair(bert, torch.float32)
    recompute_inputs(model)
    x = inputs(torch.float32)
    wanted, kept = grads(model, x), kept_bytes(model, lambda: embeddings(model, x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert same(grads(twin, x), wanted)
        assert kept_bytes(twin, lambda twin=twin: embeddings(twin, x)) == kept
        assert layers(twin)[0].lora_replays.model is twin
    alone = copy.deepcopy(layers(model)[0])
    assert alone.lora_replays.model is None


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "lora_A" in module._parameters]


def test_numbers_on_another_device_are_others() -> None:
    """What was moved, and would be computed anew where it came from."""
    assert not _same_bits(torch.ones(2), torch.ones(2, device="meta"))


def test_numbers_that_are_none_are_bits_too() -> None:
    model, replays = own(PRODUCERS["GELU"])
    x = inputs(torch.float32)
    with torch.no_grad():
        x[0, 0, 0] = float("nan")
    call(model, x).sum().backward()
    assert set(replays.proven.values()) == {True}


def test_compiled_and_removed_models_know_nothing_of_it() -> None:
    from lora_lightning import remove

    model, _ = own(PRODUCERS["layer norm"])
    x = inputs(torch.float32)
    wanted = call(model, x)
    found = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)(x * 1.5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    remove(model)
    assert not {"lora_replays", "lora_prepare"} & set(vars(model.first))
