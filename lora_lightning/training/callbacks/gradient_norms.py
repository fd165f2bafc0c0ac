"""Logs the learning rates, and the norms of the gradients of A and of B."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.checkpoints.loop_state import is_logged


class StepFigures(Callback):
    """Logs `lr`, `grad_norm/A`, `grad_norm/B` and `grad_norm/all` every `log_every_n_steps`, before clipping.

    `grad_norm/all` is over everything that trains: what `gradient_clip_val` is compared with. `lr` is the first
    group's; other groups, such as B's in LoRA+, are logged as `lr/NAME` where their rate differs.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not trainer.loggers or not (is_logged(trainer) or trainer.should_stop):
            return
        layers, (first, *others) = [layer for _, layer in adapted_layers(pl_module)], optimizer.param_groups
        figures: dict[str, Any] = {"lr": float(first["lr"])}
        for i, group in enumerate(others, 1):
            if any(group.get(key) != first.get(key) for key in ("lr", "initial_lr")):
                figures[f"lr/{group.get('name', f'group_{i}')}"] = float(group["lr"])
        parts = {
            "A": [layer.lora_A for layer in layers],
            "B": [layer.lora_B for layer in layers],
            "all": [parameter for group in optimizer.param_groups for parameter in group["params"]],
        }
        for name, parameters in parts.items():
            if gradients := [p.grad for p in parameters if p.grad is not None]:
                norm = torch.nn.utils.get_total_norm(gradients)
                # Of sharded gradients all processes must gather it.
                figures[f"grad_norm/{name}"] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()
        pl_module.log_dict(figures, batch_size=1)
