"""A head and its cross-entropy in one function, so that the logits of all tokens are never in memory together.

For trained rows i with logits `z_i = cap tanh(scale (W h_i + b) / cap)` and smoothing e over V entries,

    loss = sum_i [ log sum_v exp z_iv - (1 - e) z_iy - e mean_v z_iv ],
    d loss / d z_iv = softmax(z_i)_v - (1 - e) [v = y_i] - e / V.

times the slopes of scale and bound. Rows are taken in chunks: the gradient is computed with the loss and multiplied by
W at once, and a chunk's logits are freed before the next. Saved for backward are a gradient of the size of h, and one
of the size of W only where W trains. The idea is from "Cut Your Losses" (arXiv 2411.09009) and liger-kernel (arXiv
2410.10989); torch's `F.linear_cross_entropy` neither bounds logits nor counts right predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.functional import wide_dtype

IGNORED = -100
"""The label of tokens that are not trained on, as in torch and transformers."""


class LinearCrossEntropy(NamedTuple):
    """The loss of a batch's tokens, and the number of right predictions."""

    loss: Tensor
    """The sum over trained rows, a scalar in float32 or wider."""
    count: int  # type: ignore[assignment]  # it replaces tuple's method `count`
    """Number of trained rows."""
    correct: Tensor
    """Number of these whose largest logit is the label's; an integer scalar."""


class Terms(NamedTuple):
    """Parameters that turn `W h + b` into logits and logits into a loss."""

    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


def cross_entropy_of_logits(logits: Tensor, labels: Tensor, terms: Terms) -> LinearCrossEntropy:
    """The loss from `W h + b` (n, V) and labels (n,), all valid."""
    refuse_labels(labels, logits.shape[-1])
    z = with_terms(logits.to(wide_dtype(logits)), terms)
    loss = F.cross_entropy(z, labels, reduction="sum", label_smoothing=terms.label_smoothing)
    return LinearCrossEntropy(loss, len(labels), (z.argmax(-1) == labels).sum())


def with_terms(logits: Tensor, terms: Terms) -> Tensor:
    """The logits `cap tanh(scale z / cap)`."""
    scaled = logits if terms.logit_scale == 1.0 else logits * terms.logit_scale
    return scaled if terms.softcap is None else torch.tanh(scaled / terms.softcap) * terms.softcap


def refuse_labels(trained: Tensor, vocabulary: int, ignore_index: int = IGNORED) -> None:
    """Raise a LoRAError for a label outside of the head's entries."""
    if not len(trained):
        return
    low, high = torch.stack(trained.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise LoRAError(
            f"label {wrong} is outside of the head's {vocabulary} entries: labels are 0 to {vocabulary - 1}, or"
            f" {ignore_index} where nothing is trained on"
        )


FLOOR = 2**25
"""Bytes of logits that a chunk may always have: smaller chunks make the products slow."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> LinearCrossEntropy:
    """`F.cross_entropy(head(hidden), labels, reduction="sum")` without its logits; differentiable once.

    Under autocast the product is in autocast's dtype, as in a head; softmax and loss are in float32 or wider.

    Args:
        hidden: (n, d).
        weight: of the head, (V, d). It and `bias` get gradients where they require them.
        labels: (n,), in [0, V) or `ignore_index`.
        bias: of the head, (V,).
        label_smoothing: share of the target spread over all V entries.
        ignore_index: the label of rows to leave out.
        softcap: bound of the logits, as Gemma 2 has it.
        logit_scale: factor on `W h + b`, before the bound.

    Raises:
        LoRAError: shapes do not match, or a label is outside of the vocabulary.
    """
    _refuse_shapes(hidden, weight, labels, bias)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    trained = labels[rows]
    refuse_labels(trained, len(weight), ignore_index)
    chosen, weight, bias = _of_one_dtype(hidden[rows], weight, bias)
    terms = Terms(label_smoothing, softcap, logit_scale)
    loss, correct = _loss_and_correct(chosen, weight, bias, trained, terms)
    return LinearCrossEntropy(loss, len(rows), correct)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of trained rows would break the graph anyway
def _loss_and_correct(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
            loss, correct = _GradientInForward.apply(hidden, weight, bias, labels, terms)  # type: ignore[no-untyped-call]
            return loss, correct
        loss, correct, *_ = loss_in_chunks(hidden, weight, bias, labels, terms, (False, False, False))
        return loss, correct


class _GradientInForward(torch.autograd.Function):
    """Computes the gradient in forward; backward multiplies it by the loss's gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms
    ) -> tuple[Tensor, Tensor]:
        wanted = tuple(ctx.needs_input_grad[:3])
        loss, correct, *gradients = loss_in_chunks(hidden, weight, bias, labels, terms, wanted)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, by_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In float32: a loss scaler's factor overflows float16, and bfloat16 would round it for every entry.
        gradients = [None if g is None else (g.to(by_loss.dtype) * by_loss).to(g.dtype) for g in ctx.saved_tensors]
        return (*gradients, None, None)


def loss_in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, number correct, and the gradients `wanted` of hidden, weight and bias, summed in float32 or wider."""
    wide = wide_dtype(hidden)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    correct = torch.zeros((), dtype=torch.long, device=hidden.device)
    by_hidden = torch.empty_like(hidden) if wanted[0] else None
    by_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    by_bias = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None
    size = rows_at_once(hidden, len(weight))
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        h = hidden[part]
        logits = F.linear(h, weight, bias).to(wide)
        losses, hits = loss_of_logits_(logits, labels[part], terms, gradient=any(wanted))
        loss += losses.sum()
        correct += hits.sum()
        # `logits` has their gradient now.
        if by_bias is not None:
            by_bias += logits.sum(0)
        if any(wanted[:2]):
            logits = logits.to(h.dtype)
        if by_hidden is not None:
            torch.mm(logits, weight, out=by_hidden[part])
        if by_weight is not None:
            by_weight += logits.t() @ h
        del logits  # before the next chunk
    by_weight = None if by_weight is None else by_weight.to(weight.dtype)
    by_bias = None if by_bias is None or bias is None else by_bias.to(bias.dtype)
    return loss, correct, by_hidden, by_weight, by_bias


def loss_of_logits_(logits: Tensor, labels: Tensor, terms: Terms, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Each row's loss (m,) and whether its largest logit is the label's (m,); `logits` (m, V) get their gradient.

    Without `gradient` their content afterwards is undefined.
    """
    smoothing, cap, scale = terms
    slope: Tensor | None = None
    if scale != 1.0:
        logits.mul_(scale)
    if cap is not None:
        logits.div_(cap).tanh_()
        slope = 1 - logits.square() if gradient else None
        logits.mul_(cap)
    top, best = logits.max(-1, keepdim=True)
    at_label = labels.unsqueeze(1)
    logits.sub_(top)
    losses = logits.gather(1, at_label).squeeze(1).mul_(smoothing - 1)
    if smoothing:
        losses -= smoothing * logits.mean(-1)
    total = logits.exp_().sum(-1, keepdim=True)
    losses += total.log().squeeze(1)
    if gradient:
        logits.div_(total)
        if smoothing:
            logits.sub_(smoothing / logits.shape[1])
        logits.scatter_add_(1, at_label, torch.full_like(top, smoothing - 1))
        if slope is not None:
            logits.mul_(slope)
        if scale != 1.0:
            logits.mul_(scale)
    return losses, best.squeeze(1) == labels


def in_chunks(
    head: nn.Module, hidden: Tensor, labels: Tensor, vocabulary: int, of_logits: Callable[[Tensor, Tensor], Any]
) -> list[Any]:
    """Apply a function of logits and labels in chunks of rows through the head's forward; backward recomputes logits.

    For a head that is more than one frozen product: adapted, trained as a copy, or quantized.

    Args:
        head: (1, n, d) to (1, n, V).
        hidden: (n, d).
        labels: (n,), all valid.
        vocabulary: V, for the size of the chunks.
        of_logits: a function of (m, V) and (m,); its result for each chunk is returned.
    """

    def of(h: Tensor, y: Tensor) -> Any:
        return of_logits(head(h.unsqueeze(0)).squeeze(0), y)

    size = rows_at_once(hidden, vocabulary)
    chunks = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    if torch.is_grad_enabled():
        return [checkpoint(of, h, y, use_reentrant=False) for h, y in chunks]
    return [of(h, y) for h, y in chunks]


def rows_at_once(hidden: Tensor, vocabulary: int) -> int:
    """Rows whose logits take as many bytes as all hidden states, or `FLOOR` if that is more; at least one."""
    wide = wide_dtype(hidden)
    of_a_row = vocabulary * (wide.itemsize + (2 * hidden.element_size() if hidden.dtype != wide else 0))
    return max(1, max(hidden.numel() * wide.itemsize, FLOOR) // of_a_row)


def _of_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to autocast's dtype where it is on, except from float64; W is cast once, not for every chunk."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (hidden.dtype, weight.dtype):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _refuse_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    fit = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and labels.shape == hidden.shape[:1]
    if not fit or (bias is not None and bias.shape != weight.shape[:1]):
        b = "" if bias is None else f", bias {tuple(bias.shape)}"
        raise LoRAError(
            "expected hidden (n, d), weight (V, d), labels (n,) and bias (V,) or none, got hidden"
            f" {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}{b}"
        )
