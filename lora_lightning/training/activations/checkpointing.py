"""Activation checkpointing: forward stores only a block's inputs, and backward computes its activations again.

It works for any backbone in either mode. transformers' `gradient_checkpointing_enable` is for its own models, and
silently does nothing in eval mode, LoRA's default. A block's `forward` is replaced only during a training step's
forward: validation, generation, copies, merges and files are not affected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.trained.frozen_norm import FrozenStatistics
from lora_lightning.lora.targets.blocks import repeated_blocks

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache")
"""Arguments that pass a layer its cache of earlier tokens; a block that runs twice would add to it twice."""


class Recomputation:
    """Runs the blocks of a backbone, which must have some, so that backward computes them again."""

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
        self._forwards[key] = forward = _recompute(block.forward)
        return forward

    def __getstate__(self) -> dict[str, Any]:
        """Without the wrapped forwards, which belong to these blocks."""
        return {**self.__dict__, "_forwards": {}}


def _recompute(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args = tuple(None if _is_cache(arg) else arg for arg in args)
        kwargs = {name: None if name in CACHES or _is_cache(value) else value for name, value in kwargs.items()}
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False)

    return run


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
