"""How the adapted linear layers of a model compute, where there is a choice that changes no result but by rounding."""

from __future__ import annotations

from typing import get_args

from torch import nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers import LoRAConv1D, LoRALinear
from lora_lightning.lora.products import Prepare
from lora_lightning.lora.replay import Replays


def prepare_weights(model: nn.Module, prepare: Prepare = "auto") -> None:
    """Choose what computes the products with W0 on a CPU.

    Args:
        prepare: `auto` takes oneDNN's where it is measured to be clearly quicker than torch's own: the output then
            equals the backbone's to rounding, not bit for bit. `off` never does. `on` takes it wherever it can be had.

    Raises:
        LoRAError: another word.
    """
    if prepare not in get_args(Prepare):
        raise LoRAError(f"prepare_weights is one of {', '.join(get_args(Prepare))}, got {prepare!r}")
    for module in model.modules():
        if isinstance(module, LoRALinear | LoRAConv1D):
            module.lora_prepare = prepare


def recompute_inputs(model: nn.Module, recompute: bool = True) -> None:
    """Choose whether an adapted layer keeps its input for backward, or computes it anew from what made it.

    Only where that is cheap, and what it is made from is kept anyway: a norm, an activation, a product of two.
    Gradients stay the same, bit for bit; see `replay.py`.
    """
    replays = Replays(model) if recompute else None
    for module in model.modules():
        if isinstance(module, LoRALinear | LoRAConv1D):
            module.lora_replays = replays


def compute_apart(model: nn.Module) -> None:
    """Let no layer compute what a sibling of the same input needs: each then touches its own parameters alone.

    Results are the same to rounding; the input is read once more for each sibling.
    """
    for module in model.modules():
        if isinstance(module, LoRALinear | LoRAConv1D):
            module.__dict__.pop("lora_siblings", None)
