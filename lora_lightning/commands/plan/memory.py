"""The memory of a run in every precision and under every strategy, from a trace of its step in each."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.commands.plan.block_scaling import SHORT, depth_of, scale, shorten
from lora_lightning.commands.plan.memory_tracker import fake_mode, put_stand_ins
from lora_lightning.commands.plan.step_cost import StepCost, step_cost
from lora_lightning.lora.frozen.dtype import cast_base
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import remove
from lora_lightning.lora.layers.fused_linear import eager_arithmetic
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.training.activations.compilation import TrainingForward
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.optim import make_optimizer
from lora_lightning.training.precision import load_dtypes
from lora_lightning.training.strategies.fsdp2.wrapping import groups_of

PRECISIONS = ("float32", "bf16-mixed", "16-mixed", "bf16-base", "nf4-base")
"""Overlays, by the names of their files."""
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight under NF4 with its constants quantized too: one byte for 64 weights, and four for 256 of those."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """The precision and the checkpointing of a step."""

    precision: str
    checkpointing: bool

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of products; None without autocast."""
        return {"float32": None, "16-mixed": torch.float16}.get(self.precision, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Bytes in one precision, with or without activation checkpointing."""

    way: Way
    cost: StepCost
    w0: int
    """Frozen weights and buffers."""
    adapter: int
    """All that trains."""
    ddp: int
    """Peak of each process under DDP: that of one device, and DDP's gradient buckets."""
    fsdp2: int | None
    """Peak of each process under FSDP2; None where it cannot shard W0, as where it is quantized."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "precision": self.way.precision,
            "activation_checkpointing": self.way.checkpointing,
            **{"w0": self.w0, "adapter": self.adapter, "ddp_peak": self.ddp, "fsdp2_peak": self.fsdp2},
            **self.cost.to_dict(),
        }


class Tracer:
    """Traces steps of a module whose backbone is on the meta device.

    Args:
        module: as a fit would have it.
        batch: for the task.
        device: on which the step would run.
    """

    def __init__(self, module: LoRAModule, batch: Any, device: torch.device) -> None:
        self.module, self.batch, self.device = module, batch, device
        self._costs: dict[tuple[str, bool], StepCost] = {}

    def row(self, way: Way, processes: int) -> MemoryRow:
        """The memory of a step of LoRA.

        Raises:
            Exception: whatever the model raises where it reads values of stand-ins.
        """
        backbone = copy.deepcopy(self.module.backbone)
        if way.precision in ("bf16-base", "nf4-base"):
            cast_base(backbone, torch.bfloat16, load_dtypes(backbone, torch.bfloat16))
        # float16 takes as much memory as bfloat16.
        key = ("bf16-mixed" if way.precision == "16-mixed" else way.precision, way.checkpointing)
        if key not in self._costs:
            self._costs[key] = self.cost(backbone, way)
        cost, adapter = self._costs[key], _bytes_of_meta(adapter_tensors(backbone).values())
        fsdp2 = None
        if way.precision == "nf4-base":
            cost = replace(cost, weights=cost.weights - _nf4_saving(backbone))
        else:
            fsdp2 = _fsdp2_peak(backbone, cost, processes)
        ddp = cost.peak + cost.gradients
        return MemoryRow(way=way, cost=cost, w0=cost.weights - adapter, adapter=adapter, ddp=ddp, fsdp2=fsdp2)

    def full(self, precision: str) -> StepCost:
        """The cost of a step of full fine-tuning: all of the plain backbone trains, in float32 weights."""
        backbone = remove(copy.deepcopy(self.module.backbone))
        for parameter in backbone.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        mixed = precision if precision in ("float32", "16-mixed") else "bf16-mixed"
        return self.cost(backbone, Way(precision=mixed, checkpointing=False))

    def cost(self, backbone: nn.Module, way: Way) -> StepCost:
        """The cost of a step, of the whole backbone or from two shorter copies where all blocks are equal."""
        depth = depth_of(backbone)
        if depth is not None:
            name, blocks = depth
            try:
                shorter, longer = (self._trace(shorten(backbone, name, n), way) for n in (SHORT, SHORT + 1))
                return scale(longer, shorter, blocks - SHORT - 1)
            except Exception:  # a model that counts its blocks is traced whole
                pass
        return self._trace(copy.deepcopy(backbone), way)

    def _trace(self, backbone: nn.Module, way: Way) -> StepCost:
        mode = fake_mode()
        put_stand_ins(backbone, mode, self.device)
        put_stand_ins(self.module.task, mode, self.device)
        flags = TrainingForward(backbone, checkpointing=way.checkpointing, offload=False, compile=False)

        def loss() -> Tensor:
            with flags.on():
                return self.module.task.step(backbone, self.batch).loss

        with eager_arithmetic() if way.precision == "nf4-base" else nullcontext():
            return step_cost(
                backbone,
                loss,
                lambda: make_optimizer(backbone, self.module.optimizer, self.module.b_lr_ratio),  # type: ignore[arg-type]
                mode,
                forward_context=lambda: self._autocast(way),
            )

    def _autocast(self, way: Way) -> AbstractContextManager[Any]:
        dtype = way.autocast
        if dtype is None:
            return nullcontext()
        on = self.device.type
        return torch.autocast(on, dtype=torch.bfloat16 if on == "cpu" else dtype, cache_enabled=False)


def _bytes_of_meta(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors on the meta device."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


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
    blocks = groups_of(backbone)
    inside = {id(p) for block in blocks.values() for p in block.parameters()}
    outside = _bytes_of_meta(p for p in backbone.parameters() if id(p) not in inside)
    largest = max((_bytes_of_meta(block.parameters()) for block in blocks.values()), default=0)
    sharded = cost.weights + cost.gradients + cost.optimizer
    return -(-sharded // processes) + outside + min(2, len(blocks)) * largest + cost.peak - sharded
