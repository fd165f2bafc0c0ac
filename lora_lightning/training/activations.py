"""How a training step runs its forward: with checkpointing, with offloading, or compiled.

All of it is active only during a training step's forward: validation, generation, export and checkpoints see the plain
backbone. Imports lora.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.lora.frozen.fingerprint import count_writes
from lora_lightning.lora.layers.trained.frozen_norm import FrozenStatistics
from lora_lightning.lora.targets.blocks import repeated_blocks
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache")
"""Arguments that pass a layer its cache of earlier tokens; a block that runs twice would add to it twice."""


class Recomputation:
    """Activation checkpointing: forward stores only the blocks' inputs, and backward computes the blocks again.

    It works for any backbone that has repeated blocks, in either mode. transformers' `gradient_checkpointing_enable` is
    for its own models, and silently does nothing in eval mode, LoRA's default.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.blocks = repeated_blocks(backbone)
        if not self.blocks:
            raise LoRAError(
                f"activation_checkpointing found no blocks in {type(backbone).__name__}: modules of one class, with"
                " layers in them, side by side in an nn.ModuleList or nn.Sequential; leave it out"
            )
        self._forwards: dict[tuple[str, type], Callable[..., Any]] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block, forward stores only the blocks' inputs."""
        before = {block: vars(block).get("forward") for block in self.blocks.values()}
        try:
            for name, block in self.blocks.items():
                vars(block)["forward"] = self._forward_of(name, block)
            with without_cache(self.backbone):
                yield
        finally:
            for block, forward in before.items():
                vars(block).pop("forward", None)
                vars(block).update({} if forward is None else {"forward": forward})

    def _forward_of(self, name: str, block: nn.Module) -> Callable[..., Any]:
        """The checkpointed forward, the same object in each step: torch.compile would compile anew for another."""
        key = name, type(block)
        if key in self._forwards and "forward" not in vars(block):
            return self._forwards[key]
        for inner, module in block.named_modules():
            if (
                isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm)
                and not isinstance(module, FrozenStatistics)
                and module.running_mean is not None
                and module.training
            ):
                raise LoRAError(
                    f"activation_checkpointing would count each batch twice in the statistics of '{name}.{inner}',"
                    " which train as part of modules_to_save: leave that module, or activation_checkpointing, out"
                )
        forward = block.forward

        def recompute(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            args = tuple(None if _is_cache(arg) else arg for arg in args)
            kwargs = {name: None if name in CACHES or _is_cache(value) else value for name, value in kwargs.items()}
            if kwargs.get("use_cache"):
                kwargs["use_cache"] = False
            return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False)

        self._forwards[key] = recompute
        return recompute

    def __getstate__(self) -> dict[str, Any]:
        """Without the wrapped forwards, which belong to these blocks."""
        return {**self.__dict__, "_forwards": {}}


def _is_cache(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and any(
        cls.__module__ == "transformers.cache_utils" for cls in type(value).__mro__
    )


@contextmanager
def without_cache(backbone: nn.Module) -> Iterator[None]:
    """Within the block, no transformers model in `backbone` fills a cache unless the call says so."""
    configs: list[Any] = [getattr(module, "config", None) for module in backbone.modules()]
    configs = [config for config in configs if getattr(config, "use_cache", False) is True]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config in configs:
            config.use_cache = True


SMALL = 2**20
"""Bytes below which a tensor stays on its device."""


class Waiting:
    """A tensor's copy in CPU memory, pinned for a GPU; copied back once for all operations that need it."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        is_pinnable = self.device.type == "cuda"
        self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_pinnable)
        self.copy.copy_(tensor, non_blocking=is_pinnable)
        self._back: weakref.ref[Tensor] | None = None

    def back(self) -> Tensor:
        """The tensor on its device."""
        tensor = None if self._back is None else self._back()
        if tensor is None:
            tensor = self.copy.to(self.device, non_blocking=self.device.type == "cuda")
            self._back = weakref.ref(tensor)
        return tensor


class Offload:
    """Moves tensors that are saved for backward to the CPU, each once, also where several operations save it.

    `torch.autograd.graph.save_on_cpu` moves all saved tensors; here weights and small tensors stay.

    Args:
        small: bytes below which a tensor stays.
        stays_on: devices whose tensors stay.
    """

    def __init__(self, model: nn.Module, small: int = SMALL, stays_on: tuple[str, ...] = ("cpu", "meta")) -> None:
        self.model, self.small, self.stays_on = model, small, stays_on
        self._has_warned = False
        self.moved = 0
        """Bytes that the last forward moved."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block, tensors that operations save for backward are moved, unless all the model is on the CPU."""
        if all(p.device.type in self.stays_on for p in self.model.parameters()):
            if not self._has_warned:
                rank_zero_info("offload_activations: this run is on a CPU already, so that nothing has to be moved")
            self._has_warned = True
            yield
            return
        tensors = (*self.model.parameters(), *self.model.buffers())
        weights = {tensor.untyped_storage().data_ptr() for tensor in tensors if _is_plain(tensor)}
        seen: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()  # how often it was written into, and its copy
        self.moved = 0

        def pack(tensor: Tensor) -> Any:
            is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
            stays = is_weight or not _is_plain(tensor) or tensor.device.type in self.stays_on
            if stays or tensor.nbytes < self.small or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            writes, waiting = seen.get(tensor, (None, None))
            if writes != count_writes(tensor):
                waiting = Waiting(tensor)
                seen[tensor] = count_writes(tensor), waiting
                self.moved += tensor.nbytes
            return waiting

        def unpack(packed: Any) -> Tensor:
            return packed.back() if isinstance(packed, Waiting) else packed

        with saved_tensors_hooks(pack, unpack):
            yield


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


COMPILE_OPTIONS = ("backend", "dynamic", "fullgraph", "mode", "options")
"""Arguments of `torch.compile` that `compile` may set."""


class TrainingForward:
    """Three flags of `LoRAModule` that trade time for memory or compilation, and change results by rounding alone."""

    def __init__(
        self, backbone: nn.Module, *, checkpointing: bool, offload: bool, compile: bool | Mapping[str, Any]
    ) -> None:
        self.recomputation = Recomputation(backbone) if checkpointing else None
        self.offload = Offload(backbone) if offload else None
        self.compilation = Compilation(backbone, {} if compile is True else compile) if compile is not False else None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Around a training step's forward."""
        with ExitStack() as stack:
            for part in (self.offload, self.recomputation, self.compilation):
                if part is not None:
                    stack.enter_context(part.on())
            yield


class Compilation:
    """Compiles the backbone for training steps by `nn.Module.compile`, which renames no key.

    A transformers language model is compiled without its head, so that the loss is still computed in chunks, without
    all logits in memory (`tasks/losses/lm_head.py`).
    """

    def __init__(self, backbone: nn.Module, options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in COMPILE_OPTIONS:
                raise LoRAError(
                    f"compile takes true or options among {', '.join(COMPILE_OPTIONS)}, got '{name}'"
                    f"{did_you_mean(name, COMPILE_OPTIONS)}"
                )
        self.backbone, self.options = backbone, dict(options)
        self._calls: dict[nn.Module, Any] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block, calls of the backbone are compiled; the first one takes the time to compile."""
        if not self._calls:
            for module in parts_to_compile(self.backbone):
                module.compile(**self.options)
                self._calls[module] = module._compiled_call_impl
            rank_zero_info("compile: the first training step takes the time that compiling takes")
        try:
            for module, call in self._calls.items():
                module._compiled_call_impl = call
            yield
        finally:
            for module in self._calls:
                module._compiled_call_impl = None  # `nn.Module.compile` has no way back

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled calls, which belong to this backbone."""
        return {**self.__dict__, "_calls": {}}


def parts_to_compile(backbone: nn.Module) -> list[nn.Module]:
    """The body of a transformers language model, apart from its head; any other model whole."""
    head = backbone.get_output_embeddings() if is_a(backbone, HF_MODEL) else None  # type: ignore[operator]
    children = () if head is None else backbone.children()
    body = [child for child in children if next(child.children(), None) is not None and head not in [*child.modules()]]
    return body or [backbone]
