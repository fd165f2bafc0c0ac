"""Running a module on its rows and the same rows backwards, and seeing whether it picks entries by their values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lightning.lora.bank.row_proof import layouts

PICKS = {"nonzero", "masked_select", "_unique2", "unique_dim", "sort", "topk", "kthvalue", "bincount", "histc"}
PICKS |= {"_pack_padded_sequence", "multinomial"}
"""Operations of aten whose result says which entries there are, or in which order, by their values."""


class WrongGuess(Exception):
    """The batch is not in the dimension that was tried."""


Guess = tuple[int, int, int]
"""The dimension that is doubled, its size, and the least number of dimensions of a tensor that has it."""


def guesses(args: tuple[Any, ...], kwargs: dict[str, Any], counts: Collection[int]) -> Iterator[Guess]:
    """Where the batch may be in the model's inputs: first in the first dimension, then in the second."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for dim, least in ((0, 1), (0, 2), (1, 2)):  # a vector as long as there are rows may be one of positions
        sizes = {t.shape[dim] for t in tensors if t.dim() >= max(least, dim + 1)}
        for count in sorted(sizes & set(counts), reverse=True):
            yield dim, count, least


def run_mirrored(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], guess: Guess) -> bool:
    """Run `module` on its rows and the same backwards; whether it picks entries by their values. Inputs are copied."""
    with ExitStack() as stack:
        for inner in (m for m in module.modules() if declared_first(m) is not None):
            stack.callback(inner.register_forward_pre_hook(_refuse_elsewhere(guess), with_kwargs=True).remove)
        devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        with _Mirror(guess):
            args, kwargs = copy.deepcopy((args, kwargs))
        watch = _Picks()
        with watch:
            module(*args, **kwargs)
    return watch.found


def _refuse_elsewhere(guess: Guess) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """torch's own modules say where their rows are."""

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        first = declared_first(module)
        if first is None or not isinstance(x, Tensor) or x.is_nested or x.dim() != 3:
            return
        if not layouts(x, guess[1], [0 if first else 1]):
            raise WrongGuess

    return look


def declared_first(module: nn.Module) -> bool | None:
    """Whether rows are first, for a module of torch's that says so; None for others."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    return bool(module.batch_first) if isinstance(module, nn.MultiheadAttention | nn.RNNBase) else None


class _Mirror(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """`copy.deepcopy` within gives tensors with their rows and the same backwards, in lists and caches too."""

    def __init__(self, guess: Guess) -> None:
        super().__init__()
        self.dim, self.count, self.least = guess

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        (x, memo), key = args, id(args[0])
        if key not in memo:
            has_rows = x.dim() >= max(self.least, self.dim + 1) and x.shape[self.dim] == self.count
            x = x.detach()
            memo[key] = torch.cat([x, x.flip(self.dim)], self.dim) if has_rows else x.clone()
        return memo[key]


class _Picks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether entries are picked by their values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= _picks(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


def _picks(name: str, args: tuple[Any, ...]) -> bool:
    if name in {"index", "_unsafe_index"}:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name in {"argmax", "max"}:  # a router's choice; of token numbers it is a position
        return bool(args[0].is_floating_point() and len(args) > 1)
    if name == "_local_scalar_dense":  # a number read by the program, such as a size; a truth is asked of any mask
        return bool(args[0].dtype != torch.bool and not args[0].is_floating_point())
    return name in PICKS
