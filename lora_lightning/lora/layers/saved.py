"""A module trained in full beside the adapters, such as a new classification head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lora_lightning.lora.layers.base import Grafted, ungraft


class SavedCopy(Grafted):
    """Runs a trained copy of itself; its own tensors keep their names and never move.

    So switching the adapter off gives the original head back, and law 2 holds without exceptions.
    """

    lora_copy: nn.Module

    def add_copy(self) -> None:
        """Copy this module, its class and values, and train the copy."""
        twin = copy.deepcopy(self)
        ungraft(twin, SavedCopy)
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        self.lora_copy = twin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_enabled:
            return super().forward(*args, **kwargs)
        return self.lora_copy(*args, **kwargs)

    @torch.no_grad()
    def keep_copy(self) -> None:
        """Make the trained values this module's own, and drop the copy.

        The parameters are replaced, not written into: a tensor tied to another module stays as it was there.
        """
        for (path, own), (_, trained) in zip(_named_tensors(self), _named_tensors(self.lora_copy), strict=True):
            assert own.shape == trained.shape, path
            owner = self.get_submodule(path.rpartition(".")[0])
            value = trained.detach().clone().to(own.dtype)
            if isinstance(own, nn.Parameter):
                value = nn.Parameter(value, requires_grad=own.requires_grad)
            setattr(owner, path.rpartition(".")[2], value)
        self.drop_copy()

    def drop_copy(self) -> None:
        """Forget the trained copy."""
        del self.lora_copy
        self.__dict__.pop("lora_enabled", None)


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, tensor) for name, tensor in named if not name.startswith("lora_copy.")]
