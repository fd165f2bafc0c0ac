"""Finds how a transformers model computes its logits from its head's, by running it once.

Models may transform the head's logits (Gemma 2 bounds them, Cohere and Granite scale them). The config's values are
verified: the head gets one position, enlarged so that bounds and scales show, and the model's logits are compared with
those that the config implies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.tasks.base import logits_of
from lora_lightning.tasks.losses.token_loss import Terms, with_terms

LOUD = 100.0
"""The largest of the head's logits in the comparison: well above any bound in use (Gemma 2's is 30)."""
LARGEST = 1e4
"""The largest hidden value in the comparison: float16 ends at 65,504."""


class HeadCall(NamedTuple):
    """One call of the head within `one_position`."""

    hidden: Tensor
    """The head's full input, (b, t, d)."""
    logits: Tensor
    """Its output for the last position, (b, 1, V)."""


@contextmanager
def one_position(head: nn.Module, *, loud: bool = False) -> Iterator[list[HeadCall]]:
    """Within the block the head gets only the last position, enlarged if `loud`. Yields its calls.

    A call with anything but one tensor (b, t, d) is not changed, and is not among them.
    """
    handed: list[Tensor | None] = []
    calls: list[HeadCall] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) != 1 or args[0].dim() != 3:
            handed.append(None)
            return args
        handed.append(args[0])
        last = args[0][:, -1:].contiguous()
        return (last * _loudness(module, last) if loud else last,)

    def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        hidden = handed.pop()
        if hidden is not None:
            calls.append(HeadCall(hidden, out.detach().clone() if loud else out.detach()))  # some models change it

    handles = head.register_forward_pre_hook(before), head.register_forward_hook(after)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def terms_of(backbone: Any, head: nn.Module, inputs: Mapping[str, Any]) -> Terms | None:
    """The bound and scale between the head's logits and the model's; None where the config's do not match.

    This runs the model and restores the random state, so that a resumed run does not differ.
    """
    device = next(head.parameters()).device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        one_position(head, loud=True) as calls,
    ):
        logits = logits_of(backbone(**inputs))
    if len(calls) != 1 or logits.shape != calls[0].logits.shape:
        return None
    raw = calls[0].logits
    if not bool(torch.isfinite(raw).all() and torch.isfinite(logits).all()):
        return None
    # Dividing, bounding and multiplying round three times; Mamba returns float32 for any weights.
    tolerance = 4 * max(torch.finfo(dtype).eps for dtype in (raw.dtype, logits.dtype))
    for terms in _candidates(backbone):
        ours = with_terms(raw.double(), terms)
        if float((ours - logits.double()).abs().max()) <= tolerance * float(ours.abs().max()):
            return terms
    return None


def _loudness(head: nn.Module, last: Tensor) -> float:
    """The factor on hidden states with which the head's largest logit is `LOUD`."""
    logit, value = float(head.forward(last).abs().max()), float(last.abs().max())
    return min(LOUD / logit, LARGEST / value) if logit > 0 and value > 0 else 1.0


def terms_of_config(backbone: Any) -> Terms:
    """The bound and scale of the config, unverified."""
    return _candidates(backbone)[0]


def _candidates(backbone: Any) -> list[Terms]:
    """Combinations of bounds and scales in transformers' configs, and neither."""
    config = backbone.config.get_text_config().to_dict()
    divisor = config.get("logits_scaling")  # Granite divides by it, others multiply
    scales = [config.get("logit_scale"), config.get("lm_head_multiplier"), divisor, 1 / divisor if divisor else None]
    caps = [config.get("final_logit_softcapping"), None]
    return [Terms(0.0, cap, scale) for cap, scale in product(caps, (*(float(s) for s in scales if s), 1.0))]
