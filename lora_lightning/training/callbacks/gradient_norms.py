"""Logs the learning rates, and the norms of the gradients of A and of B."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.checkpoints.loop_state import is_logged


class StepFigures(Callback):
    """Logs `lr`, `grad_norm/A`, `grad_norm/B` and `grad_norm/all` every `log_every_n_steps`, before clipping.

    `grad_norm/all` is over everything that trains: what `gradient_clip_val` is compared with. `lr` is the first
    group's; other groups, such as B's in LoRA+, are logged as `lr/NAME` where their rate differs.
    """

    def __init__(self) -> None:
        self._other_rates: set[str] = set()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not trainer.loggers or not (is_logged(trainer) or trainer.should_stop):
            return
        figures = self._rates(optimizer)
        for name, gradients in parts_of_gradients(pl_module, optimizer).items():
            figures[f"grad_norm/{name}"] = norm_of(gradients)
        pl_module.log_dict(figures, batch_size=1)

    def _rates(self, optimizer: Optimizer) -> dict[str, Any]:
        groups = [(group.get("name", f"group_{i}"), group) for i, group in enumerate(optimizer.param_groups)]
        first = groups[0][1]
        for name, group in groups[1:]:
            if any(group.get(key) != first.get(key) for key in ("lr", "initial_lr")):
                self._other_rates.add(name)
        return {"lr": float(first["lr"])} | {
            f"lr/{name}": float(group["lr"]) for name, group in groups if name in self._other_rates
        }


def parts_of_gradients(module: LightningModule, optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """The gradients of A, of B, and all of them; a name without gradients is left out."""
    layers = [layer for _, layer in adapted_layers(module)]
    parts: dict[str, list[Tensor | None]] = {
        "A": [layer.lora_A.grad for layer in layers],
        "B": [layer.lora_B.grad for layer in layers],
        "all": [p.grad for group in optimizer.param_groups for p in group["params"]],
    }
    by_part = {name: [gradient for gradient in gradients if gradient is not None] for name, gradients in parts.items()}
    return {name: gradients for name, gradients in by_part.items() if gradients}


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all entries together, of whole or sharded tensors, as one number on the device.

    Where tensors are sharded every process must call it.
    """
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()
