"""FSDP1 on an adapted backbone: W0 lies in parts, and what trains is whole in every process.

torch's `FullyShardedDataParallel` takes a module's place in the tree, under another name. Here its units stand beside
the tree: a block stays where it is, by its own name and of its own class, and its `forward` goes through its unit,
which gathers the block's W0 for it and again for its backward. What trains is left out of the units
(`ignored_states`): adapters are megabytes, and a flat parameter that held both would keep a gradient for W0 too.

The root unit holds what lies outside of the blocks (embeddings, the head). It is gathered for the whole of a step, so
that a task may read a head's weight beside the forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from lora_lightning.lora.errors import some
from lora_lightning.lora.frozen.tensors import base_tensors
from lora_lightning.training.distributed import processes
from lora_lightning.training.strategies.groups import groups_of, named_blocks
from lora_lightning.training.strategies.wrapping import UNITS, homeless, refuse_quantised, same_everywhere

T = TypeVar("T")


class Called(nn.Module):
    """What a unit wraps: a block, by the forward that it had before another one took its place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.own = module, module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


class Step(nn.Module):
    """What the root unit wraps: whatever is to be run. It finds the backbone and the other units below it."""

    def __init__(self, backbone: nn.Module, units: Sequence[nn.Module]) -> None:
        super().__init__()
        self.backbone, self.units = backbone, nn.ModuleList(units)

    def forward(self, run: Callable[[], T]) -> T:
        return run()


def full_bytes(model: nn.Module) -> int:
    """What a full checkpoint of the weights would take: the backbone's own tensors."""
    if (units := units_of(model)) is not None:
        return units.full_bytes
    return sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if ".lora_" not in n)


class Units:
    """The units of one backbone, each with the names of the tensors of W0 that it holds.

    Args:
        blocks: what is gathered together, by name.
        whole: ids of the parameters that no unit takes.
    """

    def __init__(self, backbone: nn.Module, blocks: Mapping[str, nn.Module], whole: set[int], **options: Any) -> None:
        self.full_bytes = full_bytes(backbone)
        self._names = {name: id(tensor) for name, tensor in base_tensors(backbone).items()}
        self._ids: list[set[int]] = []
        self.units: list[FullyShardedDataParallel] = []
        for block in blocks.values():
            self._add(block, Called(block), whole, options)
            block.__dict__["forward"] = functools.wraps(block.forward)(functools.partial(self.units[-1]))
        self._add(backbone, Step(backbone, self.units), whole, options)
        self._is_in_step = False
        self.run(lambda: None)  # the first unit that runs is taken for the root
        for method in ("forward", "generate"):
            self._run_in_a_step(backbone, method)

    def _add(self, module: nn.Module, wrapped: nn.Module, whole: set[int], options: dict[str, Any]) -> None:
        self._ids.append({id(p) for p in module.parameters()} - whole.union(*self._ids))
        ignored = [p for p in wrapped.parameters() if id(p) in whole]
        unit = FullyShardedDataParallel(wrapped, ignored_states=ignored, use_orig_params=True, **options)
        _keep_in_place(unit)
        self.units.append(unit)

    def run(self, run: Callable[[], T]) -> T:
        """A step, in which what lies outside of the blocks is gathered; all processes must take it."""
        if self._is_in_step:
            return run()
        self._is_in_step = True
        try:
            with _no_inference():
                found: T = self.units[-1](run)
            return found
        finally:
            self._is_in_step = False

    def _run_in_a_step(self, backbone: nn.Module, method: str) -> None:
        own = getattr(backbone, method, None)
        if callable(own):

            @functools.wraps(own)
            def through(*args: Any, **kwargs: Any) -> Any:
                return self.run(functools.partial(own, *args, **kwargs))

            backbone.__dict__[method] = through

    def parts(self) -> Iterator[list[str]]:
        """Names of W0's tensors, those of one unit after another, each list while its unit is gathered."""
        for ids, unit in zip(self._ids, self.units, strict=True):
            names = [name for name, number in self._names.items() if number in ids]
            if names:
                with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                    yield names
        held = set[int]().union(*self._ids)
        yield [name for name, number in self._names.items() if number not in held]

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Within the block, W0 of a module's own is whole; all processes must ask for it."""
        own = {id(p) for p in module.parameters()}
        for ids, unit in zip(self._ids, self.units, strict=True):
            if own & ids:
                with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                    yield
                return
        yield


def _keep_in_place(unit: FullyShardedDataParallel) -> None:
    """Let a module have what is gathered among its parameters, where and as long as it had the parameter.

    torch takes it out in backward. What a layer computes anew there would not find its weight, or take its bias for
    one that there never was.
    """
    handle: Any = unit._handle
    if handle is not None:
        assert callable(handle._setattr_tensor)
        assert callable(handle._setattr_param)
        handle._setattr_tensor = handle._setattr_param = _put


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    module.__dict__.pop(name, None)
    module._parameters[name] = value  # type: ignore[assignment]


def _no_inference() -> Any:
    """What is gathered in inference mode could not be let go outside of it."""
    if not torch.is_inference_mode_enabled():
        return nullcontext()
    return _without_gradients()


@contextmanager
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def units_of(model: nn.Module) -> Units | None:
    """Those that `shard_w0` made of it."""
    found: Units | None = vars(model).get(UNITS)
    return found


def whole_in_parts(model: nn.Module, module: nn.Module) -> AbstractContextManager[None]:
    """W0 of one of its modules, whole within the block where units hold it; all processes must ask for it."""
    units = units_of(model)
    return nullcontext() if units is None else units.gathered(module)


def shard_w0(
    backbone: nn.Module,
    device: torch.device,
    *,
    blocks: Sequence[str] | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Shard W0 over all processes, in place; all start from process 0's values. One process keeps it whole.

    Args:
        blocks: patterns of module names, in place of the blocks that are found; none shards the backbone as one.
        reshard_after_forward: whether blocks are let go between forward and backward.

    Raises:
        LoRAError: something in the backbone cannot be sharded, by name.
    """
    if processes() == 1:
        return
    refuse_quantised(backbone, "FSDP1")
    chosen = groups_of(backbone) if blocks is None else named_blocks(backbone, blocks, "FSDP1Strategy")
    same_everywhere(backbone, device, set())
    whole = left_whole(backbone, chosen)
    _say(backbone, chosen, whole)
    trained = {id(p) for p in backbone.parameters() if p.requires_grad}
    strategy = ShardingStrategy.FULL_SHARD if reshard_after_forward else ShardingStrategy.SHARD_GRAD_OP
    options: dict[str, Any] = {"sharding_strategy": strategy, "device_id": device, "limit_all_gathers": True}
    units = Units(backbone, chosen, trained | {id(p) for p in whole.values()}, **options)
    backbone.__dict__[UNITS] = units


def left_whole(backbone: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Frozen parameters that no flat one can hold: scalars; what blocks share; what a class guards; other dtypes."""
    found = {name: p for name, p in homeless(backbone, blocks).items() if not p.requires_grad}
    for path, module in backbone.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(getattr(type(module), name, None), property):
                found[f"{path}.{name}" if path else name] = parameter
    done = {id(p) for p in found.values()}
    for path, module in (*blocks.items(), ("", backbone)):
        held = {n: p for n, p in module.named_parameters() if id(p) not in done and not p.requires_grad}
        sizes: dict[torch.dtype, int] = {}
        for parameter in held.values():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        most = max(sizes, key=lambda dtype: sizes[dtype], default=None)
        found |= {f"{path}.{n}".removeprefix("."): p for n, p in held.items() if p.dtype != most}
        done |= {id(p) for p in held.values()}
    return {name: p for name, p in found.items() if not p.requires_grad}


def _say(backbone: nn.Module, blocks: Mapping[str, nn.Module], whole: Mapping[str, Any]) -> None:
    if blocks:
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in blocks.values()))
        rank_zero_info(
            f"FSDP1: W0 lies in {processes()} parts, the adapter is whole in each process; gathered one by one:"
            f" {len(blocks)} x {kinds}"
        )
    else:
        rank_zero_warn(
            f"FSDP1: no repeated blocks were found in {type(backbone).__name__}, so it is gathered as one, all of W0 at"
            " a time; FSDP1Strategy.blocks names modules to gather one by one"
        )
    if whole:
        rank_zero_info(f"FSDP1: every process holds the whole of {some(list(whole))}")
