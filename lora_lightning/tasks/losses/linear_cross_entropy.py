"""A head and its cross-entropy in one function, so that the logits of all tokens are never in memory together.

For trained rows i with logits `z_i = cap tanh(scale head(h_i) / cap)` and smoothing e over V entries,

    loss = sum_i [ log sum_v exp z_iv - (1 - e) z_iy - e mean_v z_iv ],
    d loss / d z_iv = softmax(z_i)_v - (1 - e) [v = y_i] - e / V.

times the slopes of scale and bound. Rows are taken in chunks: the gradient is computed with the loss and sent through
the head at once, and a chunk's logits are freed before the next. Saved for backward are a gradient of the size of h,
and one of the size of each tensor of the head that trains. The idea is from "Cut Your Losses" (arXiv 2411.09009) and
liger-kernel (arXiv 2410.10989); torch's `F.linear_cross_entropy` knows only a product with a weight, and neither
smooths in chunks, nor bounds logits, nor counts right predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.functional import wide_dtype

IGNORED = -100
"""The label of tokens that are not trained on, as in torch and transformers."""
FLOOR = 2**25
"""Bytes of logits that a chunk may always have: smaller chunks make the products slow."""


class LinearCrossEntropy(NamedTuple):
    """The loss of a batch's tokens, and the number of right predictions."""

    loss: Tensor
    """The sum over trained rows, a scalar in float32 or wider."""
    count: int  # type: ignore[assignment]  # it replaces tuple's method `count`
    """Number of trained rows."""
    correct: Tensor
    """Number of these whose largest logit is the label's; an integer scalar."""


class Terms(NamedTuple):
    """Bound and scale, by which a model turns its head's output into logits `cap tanh(scale z / cap)`."""

    softcap: float | None = None
    scale: float = 1.0

    def logits(self, z: Tensor) -> Tensor:
        """The logits in float32 or wider."""
        z = z.to(wide_dtype(z))
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


UNCHANGED = Terms()


def refuse_labels(trained: Tensor, vocabulary: int) -> None:
    """Raise a LoRAError for a label outside of the head's entries."""
    low, high = torch.stack(trained.aminmax()).tolist() if len(trained) else (0, 0)
    if low < 0 or high >= vocabulary:
        raise LoRAError(
            f"label {low if low < 0 else high} is outside of the head's {vocabulary} entries: labels are 0 to"
            f" {vocabulary - 1}, or {IGNORED} where nothing is trained on"
        )


def rows_at_once(hidden: Tensor, vocabulary: int) -> int:
    """Rows whose logits take as many bytes as all hidden states, or `FLOOR` if that is more; at least one."""
    wide = wide_dtype(hidden)
    of_a_row = vocabulary * (wide.itemsize + (2 * hidden.element_size() if hidden.dtype != wide else 0))
    return max(1, max(hidden.numel() * wide.itemsize, FLOOR) // of_a_row)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of trained rows would break the graph anyway
def linear_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    vocabulary: int,
    terms: Terms = UNCHANGED,
    label_smoothing: float = 0.0,
) -> LinearCrossEntropy:
    """`F.cross_entropy(terms.logits(head(hidden)), labels, reduction="sum")` without its logits; differentiable once.

    Args:
        head: (1, n, d) to (1, n, V). Its tensors get gradients where they require them.
        hidden: (n, d).
        labels: (n,), in [0, V) or -100.
        vocabulary: V.
        terms: how the model transforms the head's output; not at all by default.
        label_smoothing: share of the target spread over all V entries.

    Raises:
        LoRAError: a label is outside of the vocabulary.
    """
    rows = (labels != IGNORED).nonzero().squeeze(1)
    hidden, labels = hidden[rows], labels[rows]
    refuse_labels(labels, vocabulary)
    is_product = type(head) is nn.Linear and "forward" not in vars(head)  # accelerate's hooks are there
    tensors: list[Tensor] = [hidden, *head.parameters()]
    device = hidden.device.type
    if is_product and torch.is_autocast_enabled(device) and all(t.dtype != torch.float64 for t in tensors):
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]  # W once, not for every chunk
    hidden, *parameters = tensors
    wide = wide_dtype(hidden)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    correct = torch.zeros((), dtype=torch.long, device=hidden.device)
    by_hidden = torch.zeros_like(hidden if hidden.requires_grad else hidden[:0])
    sums: dict[Tensor, Tensor] = {}  # of the gradients of what trains
    size = rows_at_once(hidden, vocabulary)
    is_frozen_product = is_product and not any(p.requires_grad for p in parameters)
    # One piece of memory for all chunks: the C heap would keep some of those that are freed beside the next.
    memory = hidden.new_empty(min(size, len(hidden)) if is_frozen_product else 0, vocabulary)
    for start in range(0, max(len(hidden), 1), size):  # without rows once too, so that gradients are zeros
        part = slice(start, start + size)
        h = hidden[part].detach()
        if is_frozen_product:
            weight, *bias = parameters
            out = memory[: len(h)]
            torch.addmm(bias[0], h, weight.T, out=out) if bias else torch.mm(h, weight.T, out=out)
        else:
            h.requires_grad_(hidden.requires_grad)
            # A product of two dimensions takes less memory than one of three.
            out = F.linear(h, *parameters) if is_product else head(h.unsqueeze(0)).squeeze(0)
        logits = out.detach().to(wide, copy=not is_product)
        needs_gradient = out.requires_grad or (is_frozen_product and hidden.requires_grad)
        losses, hits = loss_of_logits_(logits, labels[part], terms, label_smoothing, needs_gradient)
        loss += losses.sum()
        correct += hits.sum()
        if is_frozen_product and needs_gradient:
            torch.mm(out.copy_(logits), parameters[0], out=by_hidden[part])
        elif needs_gradient:  # `logits` has its gradient now
            leaves = _leaves(out)
            gradients = torch.autograd.grad(out, leaves, logits.to(out.dtype))
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if leaf is h:
                    by_hidden[part] = gradient
                elif leaf in sums:
                    sums[leaf] += gradient
                else:
                    sums[leaf] = gradient.to(wide_dtype(leaf), copy=True)
        del logits, out  # before the next chunk
    if torch.is_grad_enabled() and (hidden.requires_grad or sums):
        found = [by_hidden, *(total.to(leaf.dtype) for leaf, total in sums.items())]
        loss = _WithGradients.apply(loss, found, hidden, *sums)  # type: ignore[no-untyped-call]
    return LinearCrossEntropy(loss, len(rows), correct)


def _leaves(out: Tensor) -> list[Tensor]:
    """The tensors in which a backward from `out` accumulates gradients, wherever in the model they are."""
    nodes, seen, leaves = [out.grad_fn], set[Any](), list[Tensor]()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            nodes += [before for before, _ in node.next_functions]
    return leaves


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already; backward multiplies them by the loss's own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In float32: a loss scaler's factor overflows float16, and bfloat16 would round it for every entry.
        return (None, None, *((g.to(by_loss.dtype) * by_loss).to(g.dtype) for g in ctx.saved_tensors))


def loss_of_logits_(
    logits: Tensor, labels: Tensor, terms: Terms, smoothing: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Each row's loss (m,) and whether its largest logit is the label's (m,); `logits` (m, V) get their gradient.

    Without `gradient` their content afterwards is undefined.
    """
    cap, scale = terms
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
