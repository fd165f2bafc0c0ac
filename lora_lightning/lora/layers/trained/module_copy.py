"""A module trained in full beside the adapters, such as a new classification head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.class_swap import Grafted, graft, interpolate_, ungraft
from lora_lightning.lora.layers.functional import wide_dtype

COPY = "lora_copy"
"""The name of the copy, a child of the module."""


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """What is registered to run around a module's own call: torch has no public way to ask."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


class SavedCopy(Grafted):
    """Runs a trained copy of itself; its own tensors keep their names and never move.

    The copy is float32 or wider, like A and B, and computes in the original's dtype: a bfloat16 model trains a
    float32 head, whose outputs are those of the merged model to the bit.

    So switching the adapter off gives the original head back, and law 2 holds without exceptions.
    """

    lora_copy: nn.Module

    @staticmethod
    def attach(module: nn.Module, twins: dict[int, Any] | None = None) -> None:
        """Copy the module, its class and values, and train the copy.

        `twins` is deepcopy's memo: with one for all copies, what was tied is tied among the copies.
        """
        if isinstance(module, NonDynamicallyQuantizableLinear):  # an attention's out_proj, which is read, not called
            graft(module, SavedProjection, tuple(n for n, p in module._parameters.items() if p is not None))
        else:
            graft(module, SavedSequence if isinstance(module, nn.Sequential) else SavedCopy)
        twin = copy.deepcopy(module, twins)
        ungraft(twin, SavedCopy)
        # Hooks on the module run around its own call, which calls the copy: there they would run twice.
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
        frozen = dict(self.named_parameters(remove_duplicate=False))
        trained = dict(self.lora_copy.named_parameters(remove_duplicate=False))
        if all(value.dtype == frozen[name].dtype for name, value in trained.items()):
            return self.lora_copy(*args, **kwargs)
        # Half-precision steps are too coarse to train in, and its arithmetic is what the model runs on.
        cast = {name: value.to(frozen[name].dtype) for name, value in trained.items()}
        return functional_call(self.lora_copy, cast, args, kwargs)

    @torch.no_grad()
    def fold(self, folded: dict[int, torch.Tensor]) -> None:
        """Make the trained values this module's own.

        The parameters are replaced, not written into: a tensor tied to another module stays as it was there. `folded`
        holds what other copies have brought, by the id of the trained tensor, so that tied copies stay tied.
        """
        for (path, frozen), (_, trained) in zip(_named_tensors(self), _named_tensors(self.lora_copy), strict=True):
            assert frozen.shape == trained.shape, path
            owner = self.get_submodule(path.rpartition(".")[0])
            if id(trained) not in folded:
                value = trained.detach().clone().to(frozen.dtype)
                is_parameter = isinstance(frozen, nn.Parameter)
                folded[id(trained)] = nn.Parameter(value, requires_grad=frozen.requires_grad) if is_parameter else value
            setattr(owner, path.rpartition(".")[2], folded[id(trained)])

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Start the copy anew from the original."""
        for (_, frozen), (_, trained) in zip(_named_tensors(self), _named_tensors(self.lora_copy), strict=True):
            trained.copy_(frozen)
        super().reset_lora_parameters()

    def rescale_update(self, strength: float, done: set[int]) -> None:
        for (path, frozen), (_, trained) in zip(_named_tensors(self), _named_tensors(self.lora_copy), strict=True):
            interpolate_(trained, frozen, strength, done)
            if path.endswith("running_var") and bool((trained < 0).any()):
                raise LoRAError(
                    f"at a strength of {strength:g} the variance '{path}' of a module of modules_to_save is below 0:"
                    " take a smaller one"
                )
        super().rescale_update(strength, done)


class SavedSequence(SavedCopy):
    """The same for `nn.Sequential`, a list of its children: of the trained copy's while that runs, else of its own."""

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
    """The same for the `out_proj` of `nn.MultiheadAttention`: whoever reads its weight and bias gets the copy's."""

    def lora_read(self, name: str) -> torch.Tensor:
        frozen = self._parameters[name]
        assert frozen is not None
        return (
            self.lora_copy.get_parameter(name).to(frozen.dtype)
            if self.lora_enabled and COPY in self._modules
            else frozen
        )


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, tensor) for name, tensor in named if not name.startswith(f"{COPY}.")]
