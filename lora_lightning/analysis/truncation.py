"""A smaller adapter: in each layer the best approximation (Eckart and Young) of the smallest rank that holds a share of
the energy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.analysis.adapters import OUT, Adapter, Factors
from lora_lightning.analysis.measures import common_rank
from lora_lightning.lora.bank.combine import pad_pair, truncate_pair
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import Content, write_together
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.formats.peft.keys import PREFIX
from lora_lightning.lora.formats.peft.save import ranks_and_alphas
from lora_lightning.lora.formats.tensor_files import file_content
from lora_lightning.lora.frozen.spectrum import Pair
from lora_lightning.lora.init.from_weight import is_from_weight

MARK = "truncation.json"
"""The file beside a truncated adapter that records how it was made."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """The ranks and the errors of a truncated adapter."""

    directory: str
    share: float
    """The share of the energy that each layer must keep."""
    ranks: dict[str, tuple[int, int]]
    """By layer, before and after."""
    errors: dict[str, float]
    """By layer, `||s B A - s B' A'||_F / ||s B A||_F`."""
    error: float
    """The same over all layers together."""
    parameters: tuple[int, int]
    """Parameters of A and B, before and after."""
    cost: dict[str, Any] = field(default_factory=dict)
    """The change of validation metrics, where it was measured."""


def check_share(share: float) -> float:
    """Raise a LoRAError unless `share` is above 0 and at most 1; returns it as a float."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise LoRAError(f"truncate must be a share of the energy, above 0 and at most 1 (0.95), got {share!r}")
    return float(share)


def refuse_occupied(directory: Path) -> None:
    """Raise a LoRAError where files other than an earlier truncation's would be overwritten."""
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir()) and not (directory / MARK).is_file()):
        raise LoRAError(f"'{directory}' holds something other than a truncated adapter: name an empty or new folder")


def truncate(adapter: Adapter, share: float, directory: Path) -> Truncation:
    """Write the smaller adapter as a PEFT directory that `load_adapter` and PEFT open on the same base.

    Each layer's s stays. Other tensors (heads, biases, magnitudes, token rows) do not change.

    Raises:
        LoRAError: `share` is invalid, the directory holds other files, or the adapter cannot be written.
    """
    check_share(share)
    refuse_occupied(directory)
    ranks = _ranks(adapter.factors, share)
    tensors, errors, lost, whole = dict(adapter.tensors), dict[str, float](), 0.0, 0.0
    for layer in adapter.factors:
        cut, (missing, wanted) = _truncate_pair(layer, ranks[layer.name])
        A, B = (adapter.tensors[key] for key in layer.keys)
        cut_A, cut_B = cut[0].reshape(-1, *A.shape[1:]), cut[1].reshape(B.shape[0], -1, *B.shape[2:])
        tensors |= dict(zip(layer.keys, (cut_A.to(A.dtype), cut_B.to(B.dtype)), strict=True))
        errors[layer.name] = math.sqrt(missing / wanted) if wanted else 0.0
        lost, whole = lost + missing * layer.scale**2, whole + wanted * layer.scale**2
    tensors |= _fillers(adapter, ranks)
    config = _config(adapter, ranks)
    record = adapter.files.record
    alphas = _alphas(adapter, ranks)
    settings = {layer.name: (ranks[layer.name], alphas[layer.name], layer.scale) for layer in adapter.factors}
    metadata = {"format": "pt"} if record is None else record.for_changed_file(tensors, settings, config).to_metadata()
    truncation = Truncation(
        directory=str(directory),
        share=share,
        ranks={layer.name: (layer.r, ranks[layer.name]) for layer in adapter.factors},
        errors=errors,
        error=math.sqrt(lost / whole) if whole else 0.0,
        parameters=(
            sum(layer.parameters for layer in adapter.factors),
            sum(layer.cost(ranks[layer.name]) for layer in adapter.factors),
        ),
    )
    files: dict[str, Content] = {
        MARK: _json({"share": share, "ranks": ranks}),
        WEIGHTS: file_content(tensors, metadata),
        CONFIG: _json(config),
    }
    write_together(directory, files)
    return truncation


def _ranks(layers: list[Factors], share: float) -> dict[str, int]:
    """The new rank of each layer; PEFT has one rank for the two projections of an attention."""
    by_layer = {layer.name: common_rank(layer, share) for layer in layers}
    shared: dict[str, int] = {}
    for layer in layers:
        shared[layer.peft_name] = max(shared.get(layer.peft_name, 0), by_layer[layer.name])
    return {layer.name: shared[layer.peft_name] for layer in layers}


def _truncate_pair(layer: Factors, rank: int) -> tuple[Pair, tuple[float, float]]:
    """A and B of `rank` in the file's layout, and the squared norms of the error and of the original update."""
    missing = wanted = 0.0
    pairs = []
    for A, B in layer.parts:
        pair, (lost, whole) = truncate_pair(A.double(), B.double(), rank // layer.groups)
        pairs.append(pad_pair(_keep_zeros(pair, A, B), rank // layer.groups))
        missing, wanted = missing + lost, wanted + whole
    rows, columns = torch.cat([A for A, _ in pairs]), [B for _, B in pairs]
    if layer.kind == "Parameter" and len(pairs) > 1:
        return (rows, torch.stack(columns, dim=2).flatten(1)), (missing, wanted)
    return (rows, torch.cat(columns)), (missing, wanted)


def _keep_zeros(pair: Pair, A: Tensor, B: Tensor) -> Pair:
    """Set to zero what was zero before: rounding would let a group of channels see another's."""
    return pair[0].masked_fill((A == 0).all(0), 0.0), pair[1].masked_fill((B == 0).all(1, keepdim=True), 0.0)


def _alphas(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, float]:
    """The alpha of each layer that gives its s at the new rank."""
    rslora = bool(adapter.files.peft.get("use_rslora"))
    sizes = {layer.name: math.sqrt(ranks[layer.name]) if rslora else ranks[layer.name] for layer in adapter.factors}
    return {layer.name: layer.scale * sizes[layer.name] for layer in adapter.factors}


def _config(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's config with every rank and alpha, so that nothing depends on the order of patterns."""
    alphas = _alphas(adapter, ranks)
    fields = ranks_and_alphas(
        {layer.peft_name: ranks[layer.name] for layer in adapter.factors},
        {layer.peft_name: alphas[layer.name] for layer in adapter.factors},
    )
    config = {**adapter.files.peft, **fields}
    if is_from_weight(str(config.get("init_lora_weights"))):
        config["init_lora_weights"] = True  # the subtracted init is part of A and B
    return config


def _fillers(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The zeros of an attention's projection that is not adapted, at the new rank of the other one."""
    adapted = {key for layer in adapter.factors for key in layer.keys}
    by_name = {layer.peft_name: ranks[layer.name] for layer in adapter.factors}
    zeros: dict[str, Tensor] = {}
    for key in adapter.tensors:
        if key in adapted or not key.endswith(".lora_A.weight"):
            continue
        rank = by_name[key.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(OUT)]
        key_b = key.replace(".lora_A.", ".lora_B.")
        zeros[key] = torch.zeros_like(adapter.tensors[key][:1]).repeat(rank, 1)
        zeros[key_b] = torch.zeros_like(adapter.tensors[key_b][:, :1]).repeat(1, rank)
    return zeros


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
