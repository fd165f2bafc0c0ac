"""How a training step runs its forward: with checkpointing, with offloading, or compiled.

All of it is active only during a training step's forward: validation, generation, export and checkpoints see the plain
backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.training.activations.checkpointing import Recomputation
from lora_lightning.training.activations.offloading import Offload

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
