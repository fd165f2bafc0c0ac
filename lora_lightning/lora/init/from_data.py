"""Inits that need data: the layers' inputs, or the gradient of the loss in W0, measured on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.init.from_weight import DATA_INITS, eva, loftq, lora_ga
from lora_lightning.lora.layers import AdaptedLayer
from lora_lightning.lora.layers.functional import wide_dtype

Layers = list[tuple[str, AdaptedLayer]]
Loss = Callable[[nn.Module, Any], Tensor]


def refuse_data(init: str, data: Any) -> None:
    """Raise a LoRAError for an init that lacks its data, and for data that the init does not read."""
    if init in DATA_INITS and data is None:
        raise LoRAError(f"init '{init}' needs inject(model, config, data=...): {DATA_INITS[init]}; got none")
    if init not in DATA_INITS and data is not None:
        known = ", ".join(DATA_INITS)
        raise LoRAError(f"data is read by init {known} only, and init is '{init}': leave one of them out")


def init_from_data(model: nn.Module, layers: Layers, init: str, data: Any, loss: Loss | None) -> None:
    """Initialize freshly adapted layers from data, in eval mode; a LoRAError where the data does not serve."""
    if init == "loftq":
        _init_loftq(layers, data)
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        measured = _main_directions(model, layers, data) if init == "eva" else _gradients(model, layers, data, loss)
    finally:
        for module, training in modes:
            module.training = training
    for name, layer in layers:
        if name not in measured:
            raise LoRAError(f"init '{init}': the data never reached '{name}': give batches that use it, or exclude it")
        r, A = layer.lora_settings.r, layer.lora_A
        if init == "eva":
            layer.set_init(*eva(measured[name], layer.lora_B, r))
        else:
            layer.set_init(*lora_ga(measured[name].to(A.dtype), r))


def _init_loftq(layers: Layers, original: Any) -> None:
    weights = original.state_dict() if isinstance(original, nn.Module) else original
    if not isinstance(weights, Mapping):
        raise LoRAError(
            f"init 'loftq' needs the model before quantization or its state dict, got {type(weights).__name__}"
        )
    for name, layer in layers:
        weight, quantized = weights.get(f"{name}.weight"), layer.base_matrix().to(layer.lora_A.dtype)
        if weight is None or weight.shape != quantized.shape:
            got = "nothing" if weight is None else f"shape {tuple(weight.shape)}"
            raise LoRAError(f"init 'loftq' needs '{name}.weight' of shape {tuple(quantized.shape)}, got {got}")
        settings = layer.lora_settings
        layer.set_init(*loftq(quantized, weight.to(quantized.device), settings.r, settings.scale))


def _main_directions(model: nn.Module, layers: Layers, data: Iterable[Any]) -> dict[str, Tensor]:
    """The main directions (q, k) of each layer's inputs, best first, by one SVD per batch and layer.

    At most 4 r directions are kept from batch to batch, so that memory does not grow with the data.
    """
    seen: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def update(name: str, layer: AdaptedLayer, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2) if mask is None or mask.shape != x.shape[:-1] else x.detach()[mask]
        rows = rows.to(layer.lora_A.dtype)
        stack = torch.cat([seen[name], rows]) if name in seen else rows
        _, S, Vh = torch.linalg.svd(stack, full_matrices=False)
        noise = S[0] * torch.finfo(S.dtype).eps * max(stack.shape)
        keep = min(4 * layer.lora_settings.r, int((noise < S).sum()))
        seen[name] = S[:keep].unsqueeze(1) * Vh[:keep]

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers:
            hook = layer.register_forward_pre_hook(
                lambda _, args, kwargs, n=name, at=layer: update(n, at, _first(args, kwargs)), with_kwargs=True
            )
            hooks.callback(hook.remove)
        for batch in _batches(model, data):
            # Padding does not count.
            attention_mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = attention_mask.bool() if isinstance(attention_mask, Tensor) else None
            _call(model, batch)
    return {name: torch.nn.functional.normalize(rows, dim=1) for name, rows in seen.items()}


def _gradients(model: nn.Module, layers: Layers, data: Iterable[Any], loss: Loss | None) -> dict[str, Tensor]:
    """The loss's gradient in each W0, (m, k), as `sum g x^T` from the layer's inputs and output gradients."""
    total: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor, out: Tensor) -> None:
        def add(g: Tensor) -> None:
            dtype = wide_dtype(g)
            product = g.flatten(0, -2).to(dtype).T @ x.flatten(0, -2).to(dtype)
            total[name] = total[name] + product if name in total else product

        if out.requires_grad:
            out.register_hook(add)  # type: ignore[no-untyped-call]

    with ExitStack() as hooks, torch.enable_grad():
        for name, layer in layers:
            hook = layer.register_forward_hook(
                lambda _, args, kwargs, out, n=name: watch(n, _first(args, kwargs).detach(), out), with_kwargs=True
            )
            hooks.callback(hook.remove)
        for batch in _batches(model, data):
            value = loss(model, batch) if loss else _model_loss(_call(model, batch))
            # Backward to every B passes every layer's output, and writes no .grad.
            torch.autograd.grad(value, [layer.lora_B for _, layer in layers], allow_unused=True)
    return total


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's input: the first argument, positional or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _model_loss(output: Any) -> Tensor:
    value = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise LoRAError(
            "init 'lora_ga' needs a loss: give batches with labels to a model that returns one,"
            " or inject(..., data=batches, loss=function of (model, batch)); the model returned none"
        )
    return value


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _batches(model: nn.Module, data: Iterable[Any]) -> Iterator[Any]:
    """Each batch on the model's device."""
    batch = none = object()
    for batch in data:
        yield _to_device(batch, next(model.parameters()).device)
    if batch is none:
        raise LoRAError("data holds no batch: give at least one")


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    return [_to_device(value, device) for value in batch] if isinstance(batch, tuple | list) else batch
