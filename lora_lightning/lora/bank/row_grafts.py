"""A plain model whose layers compute each row by its own adapter, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lora_lightning.lora.bank.detached import Held
from lora_lightning.lora.bank.mixed_batch import Batch, LayerRows
from lora_lightning.lora.bank.row_layers import ROWS, AttentionRows, EncoderRows, SavedRows, rows_kind
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers import (
    AdaptedLayer,
    EncoderLayerHost,
    Grafted,
    ParameterHost,
    SavedCopy,
    TokenRows,
    TrainedBias,
    graft,
    ungraft,
)
from lora_lightning.lora.layers.fastpath import open_encoders
from lora_lightning.lora.layers.trained.token_rows import TokenFollower

Layers = dict[nn.Module, dict[str, Grafted]]
"""By the plain module, what stands beside it, by adapter."""


@contextmanager
def grafted_rows(model: nn.Module, sources: Mapping[str, Held], batch: Batch) -> Iterator[None]:
    """Within the block the plain `model`, in eval mode, computes every row by its own adapter, without gradients.

    Raises:
        LoRAError: the model is in train mode; an adapter has something that has no form row by row.
    """
    if model.training:
        raise LoRAError("rows: the model is in train mode, and a batch of several adapters is for eval: model.eval()")
    for name, held in sources.items():
        _refuse(name, held)
    adapted, saved = _beside(sources)
    with ExitStack() as stack:
        stack.callback(_close, model)
        _graft_all(model, batch, adapted, saved)
        _hook(stack, model, batch, {*adapted, *saved})
        stack.enter_context(torch.no_grad())
        yield


def _hook(stack: ExitStack, model: nn.Module, batch: Batch, touched: set[nn.Module]) -> None:
    """Tell the batch of every call that leads to a layer with rows: `generate` calls an encoder by itself."""
    for module in model.modules():
        if touched.intersection(module.modules()):
            stack.callback(module.register_forward_pre_hook(batch.enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(batch.leave, always_call=True).remove)


def _beside(sources: Mapping[str, Held]) -> tuple[Layers, Layers]:
    """The adapted layers and the modules saved in full."""
    adapted: Layers = {}
    saved: Layers = {}
    for name, held in sources.items():
        for share in held.shares:
            for kind, found in ((AdaptedLayer, adapted), (SavedCopy, saved)):
                if issubclass(share.grafted, kind):
                    found.setdefault(share.module, {})[name] = share.beside()
    return adapted, saved


def _graft_all(model: nn.Module, batch: Batch, adapted: Layers, saved: Layers) -> None:
    names = {module: name for name, module in model.named_modules()}
    touched = [*adapted, *saved]
    hosts: dict[nn.Module, nn.Module] = {m.out_proj: m for m in names if isinstance(m, nn.MultiheadAttention)}
    attentions = [m for m in touched if m in hosts.values()] + [hosts[m] for m in touched if m in hosts]
    for module in dict.fromkeys(attentions):
        graft(module, AttentionRows)
        module.__dict__["lora_rows"] = LayerRows(names[module], batch, adapted.get(module, {}))
    for found, attribute in ((adapted, "lora_rows"), (saved, "lora_saved_rows")):
        for module, layers in found.items():
            if isinstance(module, AttentionRows):
                continue
            graft(module, SavedRows if found is saved else rows_kind(module))
            host = hosts.get(module)
            assert host is None or isinstance(host, AttentionRows)
            module.__dict__[attribute] = LayerRows(names[module], batch, layers, host=host)
    open_encoders(list(names), touched, EncoderRows)


def _close(model: nn.Module) -> None:
    for module in list(model.modules()):
        for kind in (*ROWS, EncoderLayerHost, EncoderRows):
            if isinstance(module, kind):
                ungraft(module, kind)
        for name in ("lora_rows", "lora_saved_rows", "lora_count", "lora_enabled"):
            module.__dict__.pop(name, None)


def _refuse(name: str, held: Held) -> None:
    for share in held.shares:
        reasons: list[tuple[type[nn.Module], str]] = [
            (ParameterHost, "adapts a bare parameter, whose product the model takes itself"),
            (TokenRows, "trains token rows"),
            (TokenFollower, "trains token rows"),
            (TrainedBias, "trains a bias"),
        ]
        reason = next((reason for kind, reason in reasons if issubclass(share.grafted, kind)), None)
        if isinstance(share.module, nn.Embedding) and share.module.max_norm is not None and reason is None:
            reason = "adapts an embedding with max_norm"
        if issubclass(share.grafted, SavedCopy) and isinstance(share.module, nn.MultiheadAttention):
            reason = "saves an attention in full"
        if reason:
            raise LoRAError(
                f"rows: '{name}' {reason} at '{share.path}', which has no form row by row: activate it alone"
            )
