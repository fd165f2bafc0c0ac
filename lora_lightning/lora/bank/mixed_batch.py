"""A batch whose rows have different adapters: `with bank.rows([...]):`.

Rows must be the first dimension of every adapted module's input; anything else is refused by name. Linear layers and
convolutions compute the base once for all rows, and each group of rows adds its adapter's update. Modules of other
kinds run once more for each group, as an adapted twin of the plain module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora import layers
from lora_lightning.lora.bank.detached import Share, twin_of
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers import AdaptedLayer, Grafted, graft, take_out
from lora_lightning.lora.layers.conv import CONVS
from lora_lightning.lora.layers.trained.token_rows import TokenFollower

ATTENTION = inspect.signature(nn.MultiheadAttention.forward)
ALONE = "activate one adapter at a time"


@dataclass
class Batch:
    """The adapter of each row."""

    names: Sequence[str | None]
    repeats: int
    """How often each row is repeated consecutively."""
    batch_first: set[str]
    """Layers that are known to have rows first, by the shape of an earlier input or by their attention's option."""
    indices: dict[tuple[int, torch.device], dict[str, Tensor]] = field(default_factory=dict)

    def groups(self, layer: str, x: Any, module: nn.Module) -> dict[str, Tensor]:
        """The row numbers of each adapter; a LoRAError where x is not known to have the rows first."""
        counts = {len(self.names), len(self.names) * self.repeats}
        shape = tuple(x.shape) if isinstance(x, Tensor) and not x.is_nested else ()
        least = module.weight.dim() if isinstance(module, CONVS) else 2  # with fewer there is no dimension of rows
        # A parameter as the input, such as learned queries, has no rows, though its size may be the same.
        if len(shape) < least or shape[0] not in counts or isinstance(x, nn.Parameter):
            known = " or ".join(str(count) for count in sorted(counts))
            raise LoRAError(
                f"rows: '{layer}' sees {shape or type(x).__name__}, and its first dimension must be that of {known}"
                f" rows: name an adapter for every row, say repeats= where beams or returned sequences multiply it, or"
                f" {ALONE}"
            )
        is_sequence = len(shape) > (1 if isinstance(module, nn.Embedding) else 2) and not isinstance(module, CONVS)
        if not is_sequence or shape[1] not in counts:
            self.batch_first |= {layer} if is_sequence else set()
        elif layer not in self.batch_first:  # as many positions as rows: either dimension may be the rows
            raise LoRAError(
                f"rows: '{layer}' sees {shape}, and which dimension is that of the rows cannot be known: run a batch of"
                f" another length first, pad this one by a position, or {ALONE}"
            )
        key = (shape[0], x.device)
        if key not in self.indices:
            names = [name for name in self.names for _ in range(shape[0] // len(self.names))]
            self.indices[key] = {
                adapter: torch.tensor([i for i, name in enumerate(names) if name == adapter], device=x.device)
                for adapter in dict.fromkeys(names)
                if adapter is not None
            }
        return self.indices[key]


class MixedForward(Grafted):
    """A plain module that computes every row with that row's adapter, for as long as a block runs."""

    lora_batch: Batch
    lora_path: str
    lora_twins: dict[str, Grafted]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's output, in which each adapter's rows are replaced, or get the adapter's update."""
        out = super().forward(*args, **kwargs)
        if self.training:
            raise LoRAError(f"rows: '{self.lora_path}' is in train mode, and rows are for eval: call model.eval()")
        if isinstance(self, nn.MultiheadAttention):
            return self._attend(out, ATTENTION.bind(self, *args, **kwargs).arguments)
        inputs = [*args, *kwargs.values()]
        x, more = inputs[0], inputs[1:]
        groups = self.lora_batch.groups(self.lora_path, x, self)
        if more or not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
            raise LoRAError(f"rows: '{self.lora_path}' takes or gives more than one tensor of rows: {ALONE}")
        for adapter, rows in groups.items():
            twin: Any = self.lora_twins.get(adapter)
            if twin is None:
                continue
            mine = x.index_select(0, rows)
            if _adds_update(twin):  # in place, since copying all rows for each group would cost more than the update
                update = twin.lora_update(mine).to(out.dtype)
                out.index_copy_(0, rows, twin.lora_finish(out.index_select(0, rows) + update))
            else:
                out = out.index_copy(0, rows, twin.forward(mine))
        return out

    def _attend(self, out: tuple[Tensor, Tensor | None], arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The same for `nn.MultiheadAttention`: every argument has rows, but for an `attn_mask` of two dimensions."""
        query, weights = arguments["query"], out[1]
        for adapter, rows in self.lora_batch.groups(self.lora_path, query, self).items():
            if adapter not in self.lora_twins:
                continue
            selected = {name: value for name, value in arguments.items() if name != "self"}
            by_id = {id(t): t[rows] for t in (selected[name] for name in ("query", "key", "value"))}
            selected |= {name: by_id[id(selected[name])] for name in ("query", "key", "value")}  # one tensor stays one
            if (padding := selected.get("key_padding_mask")) is not None:
                selected["key_padding_mask"] = padding[rows]
            if (mask := selected.get("attn_mask")) is not None and mask.dim() == 3:  # (rows * heads, ...)
                selected["attn_mask"] = mask.unflatten(0, (len(query), -1))[rows].flatten(0, 1)
            adapted = self.lora_twins[adapter].forward(**selected)
            out[0].index_copy_(0, rows, adapted[0])
            if weights is not None:
                weights.index_copy_(0, rows, adapted[1])
        return out


def _adds_update(twin: Grafted) -> bool:
    """Whether the adapted twin computes the plain module's output plus an update."""
    has_update = isinstance(twin, AdaptedLayer) and isinstance(twin, (layers.LoRALinear, layers.LoRAConv1D, *CONVS))
    is_outermost = issubclass(type(twin).__bases__[0], Grafted)  # else a subclass changes the sum
    return has_update and is_outermost and not isinstance(twin, layers.TrainedBias | layers.SavedCopy)


@contextmanager
def mixed_batch(model: nn.Module, sources: Mapping[str, list[Share]], batch: Batch) -> Iterator[None]:
    """Within the block the plain `model`, in eval mode, computes every row with its adapter, without gradients.

    Raises:
        LoRAError: the model is in train mode; or an adapter or the model cannot be computed row by row.
    """
    if model.training:
        raise LoRAError("rows: the model is in train mode, and a batch of several adapters is for eval: model.eval()")
    names = {module: name for name, module in model.named_modules()}
    if sources:
        _see_batch_first(names, batch)
    twins = _twins(names, sources)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # since its kernels read weights instead of calling layers
        for module, by_adapter in twins.items():
            graft(module, MixedForward)
            module.__dict__.update(lora_batch=batch, lora_path=names[module], lora_twins=by_adapter)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in twins:
            take_out(module)


def _twins(names: Mapping[nn.Module, str], sources: Mapping[str, list[Share]]) -> dict[nn.Module, dict[str, Grafted]]:
    hosts: dict[nn.Module, nn.Module] = {
        module.out_proj: module for module in names if isinstance(module, nn.MultiheadAttention)
    }
    twins: dict[nn.Module, dict[str, Any]] = {}
    for adapter, held in sources.items():
        shares = {share.module: share for share in held}
        for module, share in shares.items():
            _refuse(adapter, share)
            if share.tensors():  # others, such as encoders, only host adapted modules
                unit = hosts.get(module, module)  # an attention reads the weights of its out_proj
                twin = twins.setdefault(unit, {}).setdefault(adapter, twin_of(unit, shares.get(unit)))
                if unit is not module:
                    twin._modules["out_proj"] = twin_of(module, share)
    return twins


def _see_batch_first(names: Mapping[nn.Module, str], batch: Batch) -> None:
    """Read from torch's modules whether rows come first; refuse those where they come second."""
    for module, name in names.items():
        is_layer = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        holder = module.self_attn if is_layer else module
        if isinstance(holder, nn.MultiheadAttention | nn.RNNBase):
            if not holder.batch_first:
                raise LoRAError(f"rows: '{name}' has batch_first=False, so that rows do not come first in it: {ALONE}")
            batch.batch_first |= {names[inner] for inner in module.modules()}


def _refuse(adapter: str, share: Share) -> None:
    reasons: list[tuple[bool, str]] = [
        (
            issubclass(share.grafted, layers.ParameterHost),
            "adapts a bare parameter, which the model multiplies itself",
        ),
        (issubclass(share.grafted, layers.TokenRows | TokenFollower), "trains token rows"),
        ("expert" in share.path, "adapts an expert, which sees only the tokens that are sent to it"),
        (getattr(share.module, "max_norm", None) is not None, "adapts an embedding with max_norm"),
    ]
    for holds, reason in reasons:
        if holds:
            raise LoRAError(f"rows: '{adapter}' {reason} at '{share.path}', which has no form row by row: {ALONE}")
