"""A module trained in full beside the adapters, such as a new classification head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.class_swap import Grafted, graft, ungraft
from lora_lightning.lora.layers.functional import wide_dtype

COPY = "lora_copy"
"""The name of the copy, a child of the module."""


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The dictionaries of hooks that run around a module's call: torch has no public way to list them."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


class SavedCopy(Grafted):
    """A module that runs a trained copy of itself; the original tensors keep their names and never change.

    The copy is float32 or wider, like A and B, and computes in the original's dtype: a bfloat16 model trains a
    float32 head, whose outputs equal those of the merged model bit for bit.
    """

    lora_copy: nn.Module

    @staticmethod
    def attach(module: nn.Module, twins: dict[int, Any] | None = None) -> None:
        """Copy the module, its class and values, and train the copy.

        `twins` is deepcopy's memo: sharing it among all copies keeps tied modules tied.
        """
        if isinstance(module, NonDynamicallyQuantizableLinear):  # an attention's out_proj, which is read, not called
            graft(module, SavedProjection, tuple(n for n, p in module._parameters.items() if p is not None))
        else:
            graft(module, SavedSequence if isinstance(module, nn.Sequential) else SavedCopy)
        twin = copy.deepcopy(module, twins)
        ungraft(twin, SavedCopy)
        # The module's hooks run around its call, which calls the copy: on the copy they would run a second time.
        for hooks in hooks_of(twin):
            hooks.clear()
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(wide_dtype(parameter))
                parameter.requires_grad_(True)
        module.lora_copy = twin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_enabled:
            return super().forward(*args, **kwargs)
        originals = dict(self.named_parameters(remove_duplicate=False))
        trained = dict(self.lora_copy.named_parameters(remove_duplicate=False))
        if all(value.dtype == originals[name].dtype for name, value in trained.items()):
            return self.lora_copy(*args, **kwargs)
        # Half precision is too coarse for the optimizer's steps, and is the model's arithmetic.
        cast = {name: value.to(originals[name].dtype) for name, value in trained.items()}
        return functional_call(self.lora_copy, cast, args, kwargs, tie_weights=False)  # every name has its own cast

    def trained_tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every parameter and buffer of the copy."""
        for (name, original), (_, trained) in zip(_named_tensors(self), _named_tensors(self.lora_copy), strict=True):
            yield name, trained, original

    def rescale_update(self, strength: float, done: set[int]) -> None:
        super().rescale_update(strength, done)
        for path, trained, _ in self.trained_tensors():
            if path.endswith("running_var") and bool((trained < 0).any()):
                raise LoRAError(
                    f"at a strength of {strength:g} the variance '{path}' of a module of modules_to_save is below 0:"
                    " take a smaller one"
                )


class SavedSequence(SavedCopy):
    """The same for `nn.Sequential`, which lists the children of the copy while the adapter is on."""

    def _children(self) -> list[nn.Module]:
        shown = self.lora_copy if self.lora_enabled and COPY in self._modules else self
        return [child for name, child in shown._modules.items() if name != COPY and child is not None]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._children())

    def __len__(self) -> int:
        return len(self._children())

    def __getitem__(self, index: int | slice) -> nn.Module:
        chosen = self._children()[index]
        return nn.Sequential(*chosen) if isinstance(chosen, list) else chosen


class SavedProjection(SavedCopy):
    """The same for the `out_proj` of `nn.MultiheadAttention`: its weight and bias read as the copy's."""

    def lora_read(self, name: str) -> Tensor:
        original = self._parameters[name]
        assert original is not None
        is_copied = self.lora_enabled and COPY in self._modules
        return self.lora_copy.get_parameter(name).to(original.dtype) if is_copied else original


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, tensor) for name, tensor in named if not name.startswith(f"{COPY}.")]
