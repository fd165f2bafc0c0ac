"""A language model's loss without all logits in memory, for transformers models whose head can be run separately.

The model runs as usual, hooks included, except that its head gets only the last position. The hidden states of all
positions, the head's input, then go through `linear_cross_entropy`; or, where the head is adapted, trains as a copy or
is quantized, through the head itself in chunks, whose logits backward recomputes.

Models may transform the head's logits (Gemma 2 bounds them, Cohere and Granite scale them). The first batch verifies
the config's values: the head gets one position, enlarged so that bounds and scales show, and the model's logits are
compared with those that the config implies. A model that transforms its logits in another way, one that is compiled as
a whole, and any `nn.Module` outside of transformers compute all logits; for a transformers model there is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.tracing import is_traced
from lora_lightning.lora.layers.trained.module_copy import hooks_of
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.tasks.base import logits_of
from lora_lightning.tasks.losses.linear_cross_entropy import (
    IGNORED,
    LinearCrossEntropy,
    Terms,
    cross_entropy_of_logits,
    in_chunks,
    linear_cross_entropy,
    with_terms,
)

_FOUND: WeakKeyDictionary[nn.Module, Terms | None] = WeakKeyDictionary()
"""The result of `terms_of` for each model."""
_SAID: WeakSet[nn.Module] = WeakSet()
"""Models for which the warning about all logits was shown."""
_ROUTED: WeakSet[nn.Module] = WeakSet()
"""Models for which the warning about the router's loss was shown."""


def shifted_loss(
    backbone: nn.Module, inputs: Mapping[str, Any], labels: Tensor, *, label_smoothing: float = 0.0
) -> LinearCrossEntropy:
    """Next-token cross-entropy: the output at position t predicts the label at t + 1.

    Args:
        backbone: returns logits (b, t, V).
        inputs: its keyword arguments, without labels.
        labels: (b, t), -100 where nothing is trained on; those of position 0 never are.
        label_smoothing: share of the target spread over the vocabulary.
    """
    return aligned_loss(backbone, inputs, shift_labels(labels), label_smoothing=label_smoothing)


def shifted_losses(backbone: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> list[LinearCrossEntropy]:
    """Return `shifted_loss` of each row by itself, from one forward."""
    labels = shift_labels(labels)
    return _losses(backbone, inputs, [(slice(i, i + 1), labels[i : i + 1]) for i in range(len(labels))], 0.0)


def shift_labels(labels: Tensor) -> Tensor:
    """Shift labels (b, t) to the outputs' positions: position t gets the label of t + 1, and the last none."""
    if labels.dim() != 2:
        raise LoRAError(
            f"a language model's labels are one for each token, (rows, tokens), got {tuple(labels.shape)}: the data are"
            " of another task"
        )
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def aligned_loss(
    backbone: nn.Module, inputs: Mapping[str, Any], labels: Tensor, *, label_smoothing: float = 0.0
) -> LinearCrossEntropy:
    """The same without the shift, for sequence to sequence: the output at position t predicts the label at t."""
    return _losses(backbone, inputs, [(slice(None), labels)], label_smoothing)[0]


def _losses(
    backbone: nn.Module, inputs: Mapping[str, Any], parts: Sequence[tuple[slice, Tensor]], label_smoothing: float
) -> list[LinearCrossEntropy]:
    """The loss of each part of the rows with its labels, from one forward; the parts cover all rows."""
    _warn_of_router_loss(backbone)
    before = before_head(backbone, inputs)
    if before is not None:
        terms = Terms(label_smoothing, before.terms.softcap, before.terms.logit_scale)
        return [_through_head(before.head, before.hidden[p], labels, before.vocabulary, terms) for p, labels in parts]
    logits = logits_of(backbone(**inputs))
    return [_of_logits(logits[part], labels, label_smoothing) for part, labels in parts]


def _warn_of_router_loss(backbone: nn.Module) -> None:
    """Warn that a mixture of experts' auxiliary router loss, which its config requests, is not added."""
    config = getattr(backbone, "config", None)
    share = getattr(config, "router_aux_loss_coef", 0)
    if share and getattr(config, "output_router_logits", False) is True and backbone not in _ROUTED:
        _ROUTED.add(backbone)
        rank_zero_warn(
            "the model's config has output_router_logits, and its router's auxiliary loss (router_aux_loss_coef"
            f" {share}) is not added: the loss is the cross-entropy alone, as where output_router_logits is false"
        )


def _of_logits(logits: Tensor, labels: Tensor, label_smoothing: float) -> LinearCrossEntropy:
    rows = _trained_rows("logits", logits, labels)
    return cross_entropy_of_logits(logits[rows], labels.to(logits.device)[rows], Terms(label_smoothing))


class BeforeHead(NamedTuple):
    """A model's head and its input."""

    head: nn.Module
    hidden: Tensor
    """(b, t, d)."""
    vocabulary: int
    terms: Terms
    """How the model transforms the head's logits."""


def before_head(backbone: nn.Module, inputs: Mapping[str, Any]) -> BeforeHead | None:
    """Run the model up to its head; None where its logits cannot be computed from there."""
    head, terms = _head_and_terms(backbone, inputs)
    if head is None:
        return None
    with one_position(head) as calls:
        backbone(**inputs)
    return BeforeHead(head, calls[0].hidden, calls[0].logits.shape[-1], terms) if len(calls) == 1 else None


def _through_head(head: nn.Module, hidden: Tensor, labels: Tensor, vocabulary: int, terms: Terms) -> LinearCrossEntropy:
    rows, labels = _trained_rows("hidden states", hidden, labels), labels.to(hidden.device)
    if not _is_one_product(head, hidden):
        parts = in_chunks(head, hidden[rows], labels[rows], vocabulary, partial(cross_entropy_of_logits, terms=terms))
        loss, correct = torch.stack([part.loss for part in parts]), torch.stack([part.correct for part in parts])
        return LinearCrossEntropy(loss.sum(), sum(part.count for part in parts), correct.sum())
    assert isinstance(head, nn.Linear)
    weight, bias = head.weight, head.bias
    return linear_cross_entropy(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        bias=bias,
        label_smoothing=terms.label_smoothing,
        softcap=terms.softcap,
        logit_scale=terms.logit_scale,
    )


def _trained_rows(what: str, states: Tensor, labels: Tensor) -> Tensor:
    """Return a mask of the labels that count, on the device of the model's states."""
    if states.dim() != 3 or states.shape[:2] != labels.shape:
        raise LoRAError(
            f"labels {tuple(labels.shape)} need one row of {what} each, got {tuple(states.shape)}: inputs and labels"
            " must be of one length"
        )
    return labels.to(states.device) != IGNORED


def _head_and_terms(backbone: nn.Module, inputs: Mapping[str, Any]) -> tuple[nn.Module | None, Terms]:
    """The head, where the model's logits follow from the head's by known terms; else None."""
    why = why_all_logits(backbone)
    if why is None:
        head: Any = backbone.get_output_embeddings()  # type: ignore[operator]
        if backbone not in _FOUND:
            _FOUND[backbone] = _candidates(backbone)[0] if is_traced() else terms_of(backbone, head, inputs)
        terms = _FOUND[backbone]
        if terms is not None:
            return head, terms
        why = "it does more to its logits than bound or scale them as its config says"
    if is_a(backbone, HF_MODEL) and backbone not in _SAID:
        _SAID.add(backbone)
        rank_zero_warn(
            f"{type(backbone).__name__} computes the logits of all tokens at once, which takes memory: {why}"
        )
    return None, Terms()


def why_all_logits(backbone: Any) -> str | None:
    """Why this model's head cannot be run separately, as far as known before it runs; None where it may."""
    if not is_a(backbone, HF_MODEL):
        return "it is no transformers model"
    if backbone._compiled_call_impl is not None:
        return "it is compiled as a whole, head and all; compile its layers or its body instead"
    head = backbone.get_output_embeddings()
    if head is None:
        return "it names no head (get_output_embeddings)"
    if any(hooks_of(head)):
        return "its head has hooks, which are to see every logit"
    if any(isinstance(p, DTensor) for p in head.parameters()):
        return "its head's weights are sharded"
    return None


def _is_one_product(head: nn.Module, hidden: Tensor) -> bool:
    """Whether the head is only torch's product with a whole weight."""
    if type(head) is not nn.Linear or "forward" in vars(head):  # accelerate's hooks are there
        return False
    weight = head.weight
    whole = weight.shape == (head.out_features, head.in_features) and not weight.is_meta
    mixed = torch.is_autocast_enabled(hidden.device.type)
    return whole and weight.device == hidden.device and (weight.dtype == hidden.dtype or mixed)


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


def _candidates(backbone: Any) -> list[Terms]:
    """Combinations of bounds and scales in transformers' configs, and neither."""
    config = backbone.config.get_text_config().to_dict()
    divisor = config.get("logits_scaling")  # Granite divides by it, others multiply
    scales = [config.get("logit_scale"), config.get("lm_head_multiplier"), divisor, 1 / divisor if divisor else None]
    caps = [config.get("final_logit_softcapping"), None]
    return [Terms(0.0, cap, scale) for cap, scale in product(caps, (*(float(s) for s in scales if s), 1.0))]
