"""Strategies of Lightning with which LoRA is not trained here, each with what to take in its place."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy

from lora_lightning.lora.errors import LoRAError

INSTEAD: dict[type[Strategy], str] = {
    FSDPStrategy: "FSDP1 is deprecated by torch, and its checkpoints gather all of W0: configs/strategy/fsdp2.yaml"
    " shards W0 likewise and writes the adapter alone",
    DeepSpeedStrategy: "DeepSpeed steps and saves by itself, past our guards and our checkpoints. ZeRO-2 spares the"
    " optimizer's state of what trains, which for an adapter is small: take configs/strategy/ddp.yaml. What ZeRO-3"
    " does, sharding W0, configs/strategy/fsdp2.yaml does",
}


def refuse_unsupported(strategy: Strategy) -> None:
    """Before anything is loaded.

    Raises:
        LoRAError: it is one of these.
    """
    for kind, why in INSTEAD.items():
        if isinstance(strategy, kind):
            raise LoRAError(f"strategy {type(strategy).__name__}: {why}")
