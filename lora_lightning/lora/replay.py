"""An input computed anew in backward from what made it, in place of being kept: less memory for a little time.

x = norm(h), or gelu(h), or silu(g) u: autograd keeps h in the operation's own node of the graph (`x.grad_fn`), whose
backward comes after the layer's. So a layer that knows the operation needs no x of its own: it reads h there and does
the operation again. That needs no knowledge of the architecture, only of a few kinds of nodes (`RULES`).

- Only the node is held, which the graph holds anyway: nothing lives longer than without.
- An h that was changed in the meantime raises in torch's own words, as it would in the operation's backward.
- The first time that a layer meets an operation, what it would compute is compared with x, bit for bit; what is not the
  same is kept as ever. A norm's epsilon, which its node does not keep, is checked each time by the 1 / std in it.
- Under hooks on saved tensors (activation checkpointing, offloading) all is kept as ever: they see to memory
  themselves.

ReLU, tanh and torch's fused attention need none of it: they keep their output, which is x, and one storage counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.traced import is_traced


class Replay(NamedTuple):
    """How a tensor is computed anew."""

    recipe: tuple[Any, ...]
    """What is done, in plain data, by which two can be told apart."""
    run: Callable[[], Tensor]


class Replays:
    """Finds how inputs can be computed anew, for all layers of one model."""

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.norms: list[nn.LayerNorm] | None = None
        self.proven: dict[tuple[Any, ...], bool] = {}
        self.proving = False

    def of(self, x: Tensor, layer: int) -> Callable[[], Tensor] | None:
        """What computes x anew; None where it has to be kept."""
        is_hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if x.grad_fn is None or x._version or is_hooked or not (torch.is_grad_enabled() and x.is_contiguous()):
            return None
        replay = self.find(x.grad_fn, x.output_nr)
        if replay is None:
            return None
        key = (layer, replay.recipe, x.shape[-1], x.dtype, x.device, torch.get_num_threads())
        if key not in self.proven:
            self.proving = True
            self.proven[key] = is_traced() or _same_bits(x, anew(replay.run))
            self.proving = False
        return replay.run if self.proven[key] else None

    def find(self, node: Any, output: int) -> Replay | None:
        """How to compute an output of the operation behind a node of the graph."""
        rule = RULES.get(node.name()) if node is not None and output == 0 else None
        return None if rule is None else rule(node, self)

    def epsilon(self, weight: Tensor | None) -> float | None:
        """Of the layer norm with that weight: the node does not keep it."""
        if self.norms is None:
            found = [] if self.model is None else list(self.model.modules())
            self.norms = [module for module in found if isinstance(module, nn.LayerNorm)]
        return next((norm.eps for norm in self.norms if norm.weight is weight is not None), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays:
        """With a copy of the model around; a layer copied alone keeps its input."""
        return Replays(None if self.model is None else memo.get(id(self.model)))

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "norms": None, "proven": {}, "proving": False}


def anew(run: Callable[[], Tensor]) -> Tensor:
    """Do it again, as the operation itself did: what autocast had to cast was cast then."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return run()


class Source(NamedTuple):
    """In place of an input that is not kept."""

    run: Callable[[], Tensor]
    ghost: Tensor
    """x's place in the graph without its numbers: `create_graph=True` differentiates by x too."""

    @classmethod
    def of(cls, x: Tensor, run: Callable[[], Tensor]) -> Source:
        return cls(run, _Ghost.apply(x))  # type: ignore[no-untyped-call]

    def x(self) -> Tensor:
        """Computed anew, for one backward pass."""
        x = anew(self.run)
        return _Filled.apply(self.ghost, x) if torch.is_grad_enabled() else x  # type: ignore[no-any-return,no-untyped-call]


class _Ghost(torch.autograd.Function):
    """One zero, in x's shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Keeps nothing."""
        return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """To what made x."""
        return grads[0]


class _Filled(torch.autograd.Function):
    """The numbers in the ghost's place."""

    @staticmethod
    def forward(ctx: Any, ghost: Tensor, x: Tensor) -> Tensor:
        """Those of x."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """To the ghost."""
        return grads[0], None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where they are no numbers, and in the same order in memory."""
    if (a.shape, a.dtype, a.stride(), a.device) != (b.shape, b.dtype, b.stride(), b.device):
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().view(bits), b.view(bits))


def _is_there(raw: Any) -> bool:
    """Whether a node keeps this tensor as it is: nothing to fetch, decompress or recompute."""
    try:
        return raw.unpack_hook is None and raw.data is not None
    except (AttributeError, RuntimeError):  # another torch, or freed
        return False


def _layer_norm(node: Any, replays: Replays) -> Replay | None:
    eps = replays.epsilon(node._saved_weight) if _is_there(node._raw_saved_weight) else None
    if eps is None or not _is_there(node._raw_saved_input):
        return None

    shape = tuple(node._saved_normalized_shape)
    return Replay(("layer_norm", eps, shape), lambda: _normed(node, eps, replays.proving))


def _normed(node: Any, eps: float, proving: bool) -> Tensor:
    """The norm again. What was proven once may have been called with another epsilon since, which its 1 / std tells.

    Then x comes from the mean and 1 / std that the node has, to rounding; on a GPU, where to look is to wait, the
    process stops.
    """
    x, weight, bias = node._saved_input, node._saved_weight, node._saved_bias
    out, _, rstd = torch.native_layer_norm(x, node._saved_normalized_shape, weight, bias, eps)
    kept = node._saved_result2
    if proving or is_traced():
        return out
    same = ((rstd == kept) | kept.isnan()).all()
    if x.device.type == "cuda":
        torch._assert_async(same, "recompute_inputs: a layer norm was called with another epsilon than its module's")
        return out
    if same:
        return out
    wide: Tensor = (x.to(kept.dtype) - node._saved_result1) * kept * weight
    return (wide if bias is None else wide + bias).to(out.dtype)


def _gelu(node: Any, replays: Replays) -> Replay | None:
    form = node._saved_approximate
    run = lambda: F.gelu(node._saved_self, approximate=form)  # noqa: E731
    return Replay(("gelu", form), run) if _is_there(node._raw_saved_self) else None


def _silu(node: Any, replays: Replays) -> Replay | None:
    return Replay(("silu",), lambda: F.silu(node._saved_self)) if _is_there(node._raw_saved_self) else None


def _mul(node: Any, replays: Replays) -> Replay | None:
    """Of each factor, the node keeps what the other's gradient needs; what it does not is looked for further up."""
    left = _factor(node, 0, node._raw_saved_self, lambda: node._saved_self, replays)
    right = _factor(node, 1, node._raw_saved_other, lambda: node._saved_other, replays)
    if left is None or right is None:
        return None
    return Replay(("mul", left.recipe, right.recipe), lambda: left.run() * right.run())


def _factor(node: Any, i: int, raw: Any, kept: Callable[[], Tensor], replays: Replays) -> Replay | None:
    if _is_there(raw):
        return Replay(("kept",), kept)
    return replays.find(*node.next_functions[i])


def _cast(node: Any, replays: Replays) -> Replay | None:
    source, dtype = replays.find(*node.next_functions[0]), node._input_metadata[0].dtype
    return source and Replay((dtype, source.recipe), lambda: source.run().to(dtype))


def _view(node: Any, replays: Replays) -> Replay | None:
    source, shape = replays.find(*node.next_functions[0]), tuple(node._input_metadata[0].shape)
    return source and Replay(("view", source.recipe), lambda: source.run().view(shape))


RULES: dict[str, Callable[[Any, Replays], Replay | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "MulBackward0": _mul,
    "ToCopyBackward0": _cast,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
}
"""By a node's name, what gives the operation's output again, where its inputs are at hand."""
