"""How far an adapter moved the model: its outputs with the adapter on and off are compared, text by text.

For a language model each position that predicts a token is compared: KL(p0 || p) of the base's next-token distribution
p0 and the adapted p, both losses on the text's next token, and whether the top predictions differ. For any other model
the pooled output is compared, and that of each repeated block: `1 - cos(h0, h)` and `||h - h0|| / ||h0||`.

Errors are over texts. A figure per token is the ratio R = sum_i y_i / sum_i t_i, where text i has the sum y_i over its
t_i tokens; its standard error is that of a ratio estimator, linearized:
`sqrt(n / (n - 1) sum_i (y_i - R t_i)^2) / sum_i t_i`. With t_i = 1 it is the mean and its usual error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.lora.bank.strength import scaled
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.tensors import get_module
from lora_lightning.lora.inject import disabled, grafted_modules
from lora_lightning.lora.layers.functional import wide_dtype
from lora_lightning.lora.targets.blocks import repeated_blocks
from lora_lightning.lora.targets.output_heads import output_head
from lora_lightning.tasks.contrastive import pool as pool_tokens
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED, refuse_labels, rows_at_once
from lora_lightning.tasks.losses.lm_head import before_head
from lora_lightning.tasks.positions import in_evaluation

MOST_NAMED = 5
"""Number of texts in the list of those that moved most."""
EXCERPT = 160
"""Characters of a text that are shown."""
KL, COSINE = "kl", "cosine"
"""The main figure of the drift: for language models, and for all others."""


class Batch(NamedTuple):
    """Some texts or images as inputs of the backbone."""

    inputs: Mapping[str, Any]
    """The backbone's arguments by name."""
    labels: Tensor | None
    """(b, t): the token that each output predicts, or -100; None where pooled outputs are compared."""
    numbers: Sequence[int]
    """The number of each row's text."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A figure over texts."""

    value: float
    error: float | None
    """Its standard error over texts; None for a single text."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A text that moved far."""

    number: int
    """The text's number from 0, in the order of the texts."""
    value: float
    """The text's KL per token, or 1 - cosine."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The drift at one strength of the update."""

    kind: str
    """`kl` for language models, `cosine` for all others."""
    figures: dict[str, Mean]
    """`kl`, `perplexity_base`, `perplexity` and `changed`; or `cosine` (1 - cosine) and `relative_l2`."""
    texts: int
    tokens: int | None = None
    layers: dict[str, dict[str, Mean]] = field(default_factory=dict)
    """By block, `cosine` and `relative_l2` of its pooled output."""
    most: list[Moved] = field(default_factory=list)

    @property
    def main(self) -> Mean:
        """The main figure, `figures[kind]`."""
        return self.figures[self.kind]


def ratio(totals: Tensor, counts: Tensor) -> Mean:
    """`sum totals / sum counts` over texts, (n,) each, with the standard error of a ratio estimator."""
    n, whole = len(totals), counts.sum()
    value = totals.sum() / whole
    if n < 2:
        return Mean(value=float(value), error=None)
    spread = (totals - value * counts).square().sum() * n / (n - 1)
    return Mean(value=float(value), error=float(spread.sqrt() / whole))


def measure_drift(
    model: nn.Module,
    batches: Iterable[Batch],
    texts: Sequence[str],
    scales: Sequence[float] = (1.0,),
    *,
    forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[float, Drift]:
    """The drift at each strength of the update; afterwards the model and its modes are unchanged.

    For each batch the base runs once and the adapted model once per strength; logits are computed in chunks of tokens,
    in float32 or wider, where the model's head can run separately.

    Args:
        model: adapted.
        batches: on the model's device; each text once.
        texts: the texts, or other names of the inputs, by number.
        scales: strengths as in `lora.bank.strength.scaled`: 1 is what was trained.
        forward: a context for each forward, such as autocast.

    Raises:
        LoRAError: the model has no adapter or no pooled output, or there is nothing to compare.
    """
    if not grafted_modules(model):
        raise LoRAError("this model has no adapter, so nothing has moved it: call inject or load_adapter first")
    by_scale: dict[float, list[Sums]] = {scale: [] for scale in scales}
    numbers: list[int] = []
    with in_evaluation(model), torch.no_grad():
        for batch in batches:
            numbers += batch.numbers
            compare = _pooled_figures if batch.labels is None else _next_tokens
            with forward():
                for scale, sums in compare(model, batch, scales):
                    by_scale[scale].append(sums)
    if not numbers:
        raise LoRAError("there are no texts to compare on")
    return {scale: _drift(numbers, parts, texts) for scale, parts in by_scale.items()}


Sums = dict[str, Tensor]
"""Each text's sum of each figure (b,), over as many tokens as its entry `tokens` says; without that entry, over one."""


def _drift(numbers: Sequence[int], parts: list[Sums], texts: Sequence[str]) -> Drift:
    """The figures from each text's sums."""
    sums = {name: torch.cat([part[name] for part in parts]).double().cpu() for name in parts[0]}
    kind = KL if KL in sums else COSINE
    counts = sums.pop("tokens", torch.ones_like(sums[kind]))
    seen = counts > 0
    if not seen.any():
        raise LoRAError("no text has two tokens, so that nothing is predicted: give longer texts")
    means = {name: ratio(values[seen], counts[seen]) for name, values in sums.items()}
    layers: dict[str, dict[str, Mean]] = {}
    for name, mean in list(means.items()):
        figure, _, layer = name.partition(" ")
        if layer:
            layers.setdefault(layer, {})[figure] = means.pop(name)
        elif figure.startswith("perplexity"):
            means[name] = _perplexity(mean)
    each = (sums[kind] / counts).masked_fill(~seen, -math.inf)
    top = each.argsort(descending=True, stable=True)[: min(MOST_NAMED, int(seen.sum()))].tolist()
    return Drift(
        kind=kind,
        figures=means,
        texts=int(seen.sum()),
        tokens=int(counts.sum()) if kind == KL else None,
        layers=layers,
        most=[Moved(number=numbers[i], value=float(each[i]), text=_excerpt(texts[numbers[i]])) for i in top],
    )


def _perplexity(loss: Mean) -> Mean:
    """exp of a mean loss, with the linearized error."""
    value = math.exp(min(loss.value, 700.0))
    return Mean(value=value, error=None if loss.error is None else value * loss.error)


def _excerpt(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else f"{line[: EXCERPT - 3]}..."


# Language models.


def _next_tokens(model: nn.Module, batch: Batch, scales: Sequence[float]) -> Iterator[tuple[float, Sums]]:
    """Yields for each strength the sums over each row's predicted tokens."""
    assert batch.labels is not None
    with disabled(model):
        base = before_head(model, batch.inputs)
    labels = base.aligned(batch.labels)
    predicted = labels != IGNORED
    size = rows_at_once(base.hidden[predicted], base.vocabulary)
    for scale in scales:
        with scaled(model, scale):
            adapted, each = before_head(model, batch.inputs), []
            chunks = (torch.split(values[predicted], size) for values in (base.hidden, adapted.hidden, labels))
            for before, after, label in zip(*chunks, strict=True):
                with disabled(model):
                    logits = base.logits(before)
                each.append(token_figures(logits, adapted.logits(after), label))
        tokens = torch.cat(each).double()
        sums = tokens.new_zeros(len(labels), tokens.shape[1] + 1)
        sums.index_add_(0, predicted.nonzero()[:, 0], torch.cat([tokens, torch.ones_like(tokens[:, :1])], 1))
        yield scale, dict(zip((KL, "perplexity_base", "perplexity", "changed", "tokens"), sums.T, strict=True))


def token_figures(base: Tensor, adapted: Tensor, labels: Tensor) -> Tensor:
    """For each token KL(base || adapted) in nats, -log p of its label in both, and whether the top predictions differ.

    Shapes: logits (n, V) and labels (n,); returns (n, 4), in float32 or wider.
    """
    refuse_labels(labels, base.shape[-1])
    p, q = (logits.to(wide_dtype(logits)).log_softmax(-1) for logits in (base, adapted))
    # A token to which the base gives no probability adds nothing.
    kl = torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1)
    losses = [-x.gather(-1, labels.unsqueeze(-1)).squeeze(-1) for x in (p, q)]
    return torch.stack([kl, *losses, (p.argmax(-1) != q.argmax(-1)).to(kl.dtype)], 1)


# All other models.


def _pooled_figures(model: nn.Module, batch: Batch, scales: Sequence[float]) -> Iterator[tuple[float, Sums]]:
    """Yields for each strength the figures of each row's pooled output and of each block's."""
    with disabled(model):
        base = _pooled_outputs(model, batch)
    for scale in scales:
        with scaled(model, scale):
            adapted = _pooled_outputs(model, batch)
        sums: Sums = {}
        for name, before in base.items():
            for figure, values in _vector_figures(before, adapted[name]).items():
                sums[f"{figure} {name}".rstrip()] = values
        yield scale, sums


def _vector_figures(base: Tensor, adapted: Tensor) -> dict[str, Tensor]:
    """`1 - cos` and `||adapted - base|| / ||base||` of each row, exactly 0 for equal rows. (b, d) to (b,)."""
    h0, h = base.double(), adapted.double()
    norm0, norm = (x.norm(dim=-1).clamp_min(1e-300) for x in (h0, h))
    # 1 - cos = ||u - v||^2 / 2 of the unit vectors, which is exact near 0, where 1 minus a product would cancel.
    apart = h / norm.unsqueeze(-1) - h0 / norm0.unsqueeze(-1)
    return {COSINE: apart.square().sum(-1) / 2, "relative_l2": (h - h0).norm(dim=-1) / norm0}


def _pooled_outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The pooled output, under the name "", and that of each repeated block: one vector (b, d) for each row.

    The pooled output is the input of the model's head; without a head, its embeddings, its `last_hidden_state`, or the
    tensor that it returns. Tokens (b, t, d) are averaged where `attention_mask` is 1, and so are positions of an image.

    Raises:
        LoRAError: the model has none of these.
    """
    pooled: dict[str, Tensor] = {}

    def keep(name: str, value: Any, module: nn.Module | None = None) -> None:
        while isinstance(value, Mapping | tuple | list):  # of an output, the first tensor
            value = next(iter(value.values() if isinstance(value, Mapping) else value), None)
        vector = pool_rows(value, len(batch.numbers), batch.inputs.get("attention_mask"), module)
        if vector is not None and (name or name not in pooled):  # of several heads the first one's input
            pooled[name] = vector

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, out: keep(name, out, module)

    handles = [block.register_forward_hook(hook(name)) for name, block in repeated_blocks(model).items()]
    heads = [get_module(model, name) for name in output_head(model)]
    handles += [head.register_forward_pre_hook(lambda _, args: keep("", args)) for head in heads]
    try:
        out = model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    named = out if isinstance(out, Mapping) else {"last_hidden_state": out}
    embeddings = [x for name in ("image_embeds", "text_embeds") if isinstance(x := named.get(name), Tensor)]
    if len(embeddings) == 2:
        keep("", torch.cat(embeddings, -1))
    keep("", named.get("last_hidden_state"))
    if "" not in pooled:
        raise LoRAError(
            f"{type(model).__name__} has no pooled output: no head that is handed features, no last_hidden_state, no"
            " embeddings, and no tensor with a row for each input; the drift of such a model is not measured"
        )
    return pooled


def pool_rows(h: object, rows: int, mask: Any = None, module: nn.Module | None = None) -> Tensor | None:
    """One vector (b, d) for each row, in float32 or wider; None where `h` is no tensor with a dimension of rows.

    Args:
        h: (b, d), tokens (b, t, d), or images (b, d, height, width), with d last where the module's norms are over it.
        rows: b.
        mask: (b, t), 1 where a token counts.
        module: the module that returned `h`.
    """
    if not isinstance(h, Tensor) or not h.is_floating_point() or h.dim() not in (2, 3, 4) or len(h) != rows:
        return None
    h = h.to(wide_dtype(h))
    if h.dim() == 2:
        return h
    if h.dim() == 4:
        norms = [m for m in module.modules() if isinstance(m, nn.LayerNorm)] if module is not None else []
        shapes = {tuple(norm.normalized_shape) for norm in norms}
        last = (h.shape[-1],) in shapes and (h.shape[1],) not in shapes
        return h.mean((1, 2) if last else (2, 3))
    if isinstance(mask, Tensor) and mask.shape == h.shape[:2]:
        return pool_tokens(h, mask, "mean")
    return h.mean(1)
