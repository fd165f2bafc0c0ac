"""The memory of a run in every precision and under every strategy, from a trace of its step in each."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.commands.plan.block_scaling import cost_of_copies
from lora_lightning.commands.plan.step_cost import StepCost, bytes_of, step_cost
from lora_lightning.lora.frozen.dtype import cast_base
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import remove
from lora_lightning.lora.layers.fused_linear import eager_arithmetic
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.training.activations import TrainingForward
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.optim import make_optimizer
from lora_lightning.training.precision import load_dtypes
from lora_lightning.training.strategies.fsdp2 import groups_of

PRECISIONS = {
    "float32": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-base": torch.bfloat16,
    "nf4-base": torch.bfloat16,
}
"""The overlays, by the names of their files, with the dtype of autocast."""
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight under NF4 with its constants quantized too: one byte for 64 weights, and four for 256 of those."""


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Bytes in one precision, with or without activation checkpointing."""

    precision: str
    activation_checkpointing: bool
    w0: int
    """Frozen weights and buffers."""
    adapter: int
    """All that trains."""
    ddp_peak: int
    """Peak of each process under DDP: that of one device, and DDP's gradient buckets."""
    fsdp2_peak: int | None
    """Peak of each process under FSDP2; None where it cannot shard W0, as where it is quantized."""
    cost: StepCost

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: value for name, value in vars(self).items() if name != "cost"} | self.cost.to_dict()


class Tracer:
    """Traces steps of a module whose backbone is on the meta device.

    Its methods raise whatever the model raises where it reads values of stand-ins.

    Args:
        module: as a fit would have it.
        batch: for the task.
        device: on which the step would run.
    """

    def __init__(self, module: LoRAModule, batch: Any, device: torch.device) -> None:
        self.module, self.batch, self.device = module, batch, device

    def row(self, precision: str, checkpointing: bool, processes: int) -> MemoryRow:
        """The memory of a step of LoRA."""
        backbone, is_nf4 = copy.deepcopy(self.module.backbone), precision == "nf4-base"
        if precision.endswith("-base"):
            cast_base(backbone, torch.bfloat16, load_dtypes(backbone, torch.bfloat16))
        with eager_arithmetic() if is_nf4 else nullcontext():
            cost = self._cost(backbone, precision, checkpointing)
        if is_nf4:
            cost = replace(cost, weights=cost.weights - _nf4_saving(backbone))
        adapter = bytes_of(adapter_tensors(backbone).values())
        return MemoryRow(
            precision=precision,
            activation_checkpointing=checkpointing,
            w0=cost.weights - adapter,
            adapter=adapter,
            ddp_peak=cost.peak + cost.gradients,
            fsdp2_peak=None if is_nf4 else _fsdp2_peak(backbone, cost, processes),
            cost=cost,
        )

    def full(self, precision: str) -> StepCost:
        """The cost of a step of full fine-tuning: all of the plain backbone trains, in float32 weights."""
        backbone = remove(copy.deepcopy(self.module.backbone))
        for parameter in backbone.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        return self._cost(backbone, precision, checkpointing=False)

    def _cost(self, backbone: nn.Module, precision: str, checkpointing: bool) -> StepCost:
        dtype, on = PRECISIONS[precision], self.device.type
        if dtype is not None and on == "cpu":
            dtype = torch.bfloat16

        def trace(backbone: nn.Module) -> StepCost:
            task = copy.deepcopy(self.module.task)
            flags = TrainingForward(backbone, checkpointing=checkpointing, offload=False, compile=False)

            def loss() -> Tensor:
                with torch.autocast(on, dtype, enabled=dtype is not None, cache_enabled=False), flags.on():
                    return task.step(backbone, self.batch).loss

            def optimizer() -> torch.optim.Optimizer:
                return make_optimizer(backbone, self.module.optimizer, self.module.b_lr_ratio)  # type: ignore[arg-type]

            return step_cost(nn.ModuleList([backbone, task]), loss, optimizer, self.device)

        return cost_of_copies(backbone, trace)


def _nf4_saving(backbone: nn.Module) -> int:
    """Bytes that 4 bit saves over 16 in W0: in every linear layer but the head."""
    head = backbone.get_output_embeddings() if is_a(backbone, HF_MODEL) else None  # type: ignore[operator]
    weights = {id(m.weight): m.weight for m in backbone.modules() if isinstance(m, nn.Linear) and m is not head}
    frozen = [w for w in weights.values() if not w.requires_grad]
    return int(sum(w.numel() * (w.element_size() - NF4_BITS / 8) for w in frozen))


def _fsdp2_peak(backbone: nn.Module, cost: StepCost, processes: int) -> int:
    """The peak of each process under FSDP2.

    It has its shard of weights, gradients and optimizer; whole, what is outside of the blocks, and two blocks, of which
    one is computed while the next is gathered; and the activations of its batch.
    """
    blocks = [list(block.parameters()) for block in groups_of(backbone).values()]
    inside = {id(parameter) for block in blocks for parameter in block}
    outside = bytes_of(p for p in backbone.parameters() if id(p) not in inside)
    largest = max(map(bytes_of, blocks), default=0)
    sharded = cost.weights + cost.gradients + cost.optimizer
    return -(-sharded // processes) + outside + min(2, len(blocks)) * largest + cost.peak - sharded
