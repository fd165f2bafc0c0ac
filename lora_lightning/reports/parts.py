"""Which dtype each part of a run has, and which mode the backbone is in: told once, at the start."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer

from lora_lightning.lora.frozen.dtype import base_dtypes, short
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from lora_lightning.lora.layers import SavedCopy
from lora_lightning.training.module import LoRAModule


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Dtypes by part, as they are while the fit runs."""

    w0: dict[str, int]
    """Numbers of W0 by dtype or quantisation, the most first."""
    adapter: list[str]
    """Of A, B and what else trains beside W0; one but for odd models."""
    saved: dict[str, list[str]]
    """Of each module of `modules_to_save`."""
    autocast: str | None
    """The dtype in which autocast computes; None without it."""
    precision: str
    """As the Trainer has it."""
    asked: str | None
    """As it was asked for, where that is another word."""
    backbone_mode: str
    dropout: list[float]
    """LoRA's own, which is on in training whatever the backbone's mode."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        return asdict(self)

    def lines(self) -> tuple[str, str]:
        """What a person reads: dtypes, then modes."""
        total = max(1, sum(self.w0.values()))
        shares = [name if len(self.w0) == 1 else f"{name} {_percent(n / total)}" for name, n in self.w0.items()]
        told = [f"W0 {', '.join(shares)}", f"A and B {', '.join(self.adapter)}"]
        told += [f"{name} {', '.join(dtypes)}" for name, dtypes in self.saved.items()]
        told.append(f"{self.autocast} autocast" if self.autocast else "no autocast")
        asked = "" if self.asked is None else f", for {self.asked}{self._why()}"
        return f"dtypes: {'; '.join(told)} (precision {self.precision}{asked})", f"modes: {self._modes()}"

    def _why(self) -> str:
        return ", which CPUs do not have" if self.asked in ("16-mixed", "16") else ""

    def _modes(self) -> str:
        own = "off" if self.backbone_mode == "eval" else "on"
        ours = f", LoRA's {' and '.join(f'{p:g}' for p in self.dropout)} on" if self.dropout else ""
        return f"the backbone in {self.backbone_mode} (backbone_mode): its own dropout {own}{ours}"


def parts_of(module: LoRAModule, trainer: Trainer) -> Parts:
    """The parts of a module that a trainer has set up."""
    model, asked = module.backbone, getattr(trainer, "precision_asked", None)
    copies = grafted_modules(model, SavedCopy)
    heads = {id(t) for _, saved in copies for t in saved.lora_copy.parameters()}
    factors = [t for t in adapter_tensors(model).values() if id(t) not in heads and t.is_floating_point()]
    precision = str(trainer.precision)
    return Parts(
        w0=base_dtypes(model),
        adapter=_dtypes(factors),
        saved={name: _dtypes(saved.lora_copy.parameters()) for name, saved in copies},
        autocast=_autocast(trainer),
        precision=precision,
        asked=None if asked is None or str(asked) in (precision, precision.partition("-")[0]) else str(asked),
        backbone_mode=module.backbone_mode,
        dropout=sorted({layer.lora_settings.dropout for _, layer in adapted_layers(model)} - {0.0}),
    )


def _dtypes(tensors: Any) -> list[str]:
    return sorted({short(tensor.dtype) for tensor in tensors})


def _autocast(trainer: Trainer) -> str | None:
    kind = trainer.strategy.root_device.type
    with trainer.precision_plugin.forward_context():
        return short(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


def _percent(share: float) -> str:
    return f"{share:.0%}" if 0.01 <= share <= 0.99 else f"{share:.2%}"
