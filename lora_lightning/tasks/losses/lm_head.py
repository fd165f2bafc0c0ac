"""A language model's loss without all logits in memory, for transformers models whose head can be run separately.

The model runs as usual, hooks included, except that its head gets only the last position. The hidden states of all
positions, the head's input, then go through the head in chunks.

Models may transform the head's logits (Gemma 2 bounds them, Cohere and Granite scale them). The first batch verifies
the config's values: numbers so large that bounds and scales show stand in for the head's output, and the model's
logits are compared with those that the config implies. A model that transforms its logits in another way, one that is
compiled as a whole, and any `nn.Module` outside of transformers compute all logits; for a transformers model there is
a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

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
    UNCHANGED,
    LinearCrossEntropy,
    Terms,
    linear_cross_entropy,
)

_FOUND: WeakKeyDictionary[nn.Module, Terms | None] = WeakKeyDictionary()
"""The result of `terms_of` for each model."""
_SAID: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""The warnings that were shown for each model."""


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


def aligned_loss(
    backbone: nn.Module, inputs: Mapping[str, Any], labels: Tensor, *, label_smoothing: float = 0.0
) -> LinearCrossEntropy:
    """The same without the shift, for sequence to sequence: the output at position t predicts the label at t."""
    config = getattr(backbone, "config", None)
    share = getattr(config, "router_aux_loss_coef", 0)
    if share and getattr(config, "output_router_logits", False) is True:
        _warn_once(
            backbone,
            "the model's config has output_router_logits, and its router's auxiliary loss (router_aux_loss_coef"
            f" {share}) is not added: the loss is the cross-entropy alone, as where output_router_logits is false",
        )
    return before_head(backbone, inputs).loss(labels, label_smoothing)


def shifted_losses(backbone: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> list[LinearCrossEntropy]:
    """Return `shifted_loss` of each row by itself, from one forward."""
    found = before_head(backbone, inputs)
    labels = found.aligned(shift_labels(labels))
    return [found._replace(hidden=found.hidden[i : i + 1]).loss(labels[i : i + 1]) for i in range(len(labels))]


def shift_labels(labels: Tensor) -> Tensor:
    """Shift labels (b, t) to the outputs' positions: position t gets the label of t + 1, and the last none."""
    if labels.dim() != 2:
        raise LoRAError(
            f"a language model's labels are one for each token, (rows, tokens), got {tuple(labels.shape)}: the data are"
            " of another task"
        )
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


class BeforeHead(NamedTuple):
    """A model's head and its input; where the head cannot be run separately, the identity and the model's logits."""

    head: nn.Module
    hidden: Tensor
    """(b, t, d)."""
    vocabulary: int
    terms: Terms = UNCHANGED
    """How the model transforms the head's output."""

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (n, V), in float32 or wider, of hidden states (n, d)."""
        return self.terms.logits(self.head(hidden.unsqueeze(0)).squeeze(0))

    def aligned(self, labels: Tensor) -> Tensor:
        """Labels (b, t) on the device of the hidden states; others than one for each state are refused."""
        if self.hidden.dim() != 3 or self.hidden.shape[:2] != labels.shape:
            raise LoRAError(
                f"labels {tuple(labels.shape)} need one row of the model's states each, got"
                f" {tuple(self.hidden.shape)}: inputs and labels must be of one length"
            )
        return labels.to(self.hidden.device)

    def loss(self, labels: Tensor, label_smoothing: float = 0.0) -> LinearCrossEntropy:
        """The sum over the labels (b, t) that are not -100, in chunks."""
        labels, hidden = self.aligned(labels).flatten(), self.hidden.flatten(0, 1)
        out: LinearCrossEntropy = linear_cross_entropy(
            self.head, hidden, labels, self.vocabulary, self.terms, label_smoothing
        )
        return out


def before_head(backbone: nn.Module, inputs: Mapping[str, Any]) -> BeforeHead:
    """Run the model up to its head, or with it where its logits cannot be computed from there."""
    why = _why_all_logits(backbone)
    if why is None:
        head: Any = backbone.get_output_embeddings()  # type: ignore[operator]
        if backbone not in _FOUND:
            _FOUND[backbone] = _candidates(backbone)[0] if is_traced() else terms_of(backbone, head, inputs)
        terms = _FOUND[backbone]
        if terms is not None:
            with one_position(head) as calls:
                backbone(**inputs)
            if len(calls) == 1:
                return BeforeHead(head, calls[0].hidden, calls[0].logits.shape[-1], terms)
        why = "it does more to its logits than bound or scale them as its config says"
    if is_a(backbone, HF_MODEL):
        what = f"{type(backbone).__name__} computes the logits of all tokens at once, which takes memory"
        _warn_once(backbone, f"{what}: {why}")
    logits = logits_of(backbone(**inputs))
    return BeforeHead(nn.Identity(), logits, logits.shape[-1])


def _why_all_logits(backbone: Any) -> str | None:
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


def _warn_once(backbone: nn.Module, message: str) -> None:
    said = _SAID.setdefault(backbone, set())
    if message not in said:
        said.add(message)
        rank_zero_warn(message)


LOUDEST = 100.0
"""The largest of the probe's logits: well above any bound in use (Gemma 2's is 30)."""


class HeadCall(NamedTuple):
    """One call of the head within `one_position`."""

    hidden: Tensor
    """The head's full input, (b, t, d)."""
    logits: Tensor
    """Its output for the last position, (b, 1, V), or the probe in its place."""


@contextmanager
def one_position(head: nn.Module, *, probe: bool = False) -> Iterator[list[HeadCall]]:
    """Within the block the head gets only the last position. Yields its calls.

    With `probe` it returns evenly spaced numbers from -LOUDEST to LOUDEST. A call with anything but one tensor
    (b, t, d) is not changed, and is not among them.
    """
    handed: list[Tensor | None] = []
    calls: list[HeadCall] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        is_one = len(args) == 1 and args[0].dim() == 3
        handed.append(args[0] if is_one else None)
        return (args[0][:, -1:].contiguous(),) if is_one else args

    def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        hidden = handed.pop()
        if hidden is None:
            return None
        if not probe:
            calls.append(HeadCall(hidden, out.detach()))
            return None
        loud = torch.linspace(-LOUDEST, LOUDEST, out.shape[-1]).to(out).expand(out.shape)
        calls.append(HeadCall(hidden, loud))
        return loud.clone()  # some models change it

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
        one_position(head, probe=True) as calls,
    ):
        logits = logits_of(backbone(**inputs))
    if len(calls) != 1 or logits.shape != calls[0].logits.shape:
        return None
    loud = calls[0].logits
    # Dividing, bounding and multiplying round three times; Mamba returns float32 for any weights.
    tolerance = 4 * max(torch.finfo(dtype).eps for dtype in (loud.dtype, logits.dtype))
    for terms in _candidates(backbone):
        ours = terms.logits(loud.double())
        if float((ours - logits.double()).abs().max()) <= tolerance * float(ours.abs().max()):
            return terms
    return None


def _candidates(backbone: Any) -> list[Terms]:
    """Combinations of bounds and scales in transformers' configs, and neither."""
    config = backbone.config.get_text_config().to_dict()
    divisor = config.get("logits_scaling")  # Granite divides by it, others multiply
    scales = [config.get("logit_scale"), config.get("lm_head_multiplier"), divisor, 1 / divisor if divisor else None]
    caps = [config.get("final_logit_softcapping"), None]
    return [Terms(cap, scale) for cap, scale in product(caps, (*(float(s) for s in scales if s), 1.0))]
