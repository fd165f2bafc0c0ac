"""A smaller adapter: in each layer the best approximation (Eckart and Young) of the smallest rank that holds a share of
the energy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_lightning.analysis.adapters import OUT, Adapter, Factors
from lora_lightning.analysis.measures import common_rank
from lora_lightning.lora.bank.combine import Loss, truncate_pair
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import refuse_occupied, write_together
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.formats.peft.keys import PREFIX
from lora_lightning.lora.formats.peft.save import ranks_and_alphas
from lora_lightning.lora.formats.provenance import config_digests
from lora_lightning.lora.formats.tensor_files import file_content
from lora_lightning.lora.frozen.fingerprint import fingerprint_of_tensors
from lora_lightning.lora.frozen.spectrum import Pair, pad_pair
from lora_lightning.lora.init.from_weight import is_from_weight

WHAT, MARK = "a truncated adapter", "truncation.json"
"""What is written, for errors, and the file beside it that records how it was made."""


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


def check_share(share: float) -> None:
    """Raise a LoRAError unless `share` is above 0 and at most 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise LoRAError(f"truncate must be a share of the energy, above 0 and at most 1 (0.95), got {share!r}")


def truncate(adapter: Adapter, share: float, directory: Path) -> Truncation:
    """Write the smaller adapter as a PEFT directory that `load_adapter` and PEFT open on the same base.

    Each layer's s stays. Other tensors (heads, biases, magnitudes, token rows) do not change.

    Raises:
        LoRAError: `share` is invalid, the directory holds other files, or the adapter cannot be written.
    """
    check_share(share)
    refuse_occupied(directory, WHAT, MARK)
    layers, config, record = adapter.factors, dict(adapter.files.peft), adapter.files.record
    ranks, alphas = dict[str, int](), dict[str, float]()  # by PEFT's names: two projections of an attention have one
    for layer in layers:
        ranks[layer.peft_name] = max(ranks.get(layer.peft_name, 0), common_rank(layer, share))
    tensors, settings, losses = dict(adapter.tensors), dict[str, tuple[int, float, float]](), dict[str, Loss]()
    for key in tensors.keys() - {key for layer in layers for key in layer.keys}:
        if key.endswith(".lora_A.weight"):  # the zeros of an attention's projection that is not adapted
            rank = ranks[key.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(OUT)]
            key_b = key.replace(".lora_A.", ".lora_B.")
            tensors[key], tensors[key_b] = tensors[key][:rank], tensors[key_b][:, :rank].contiguous()
    for layer in layers:
        rank = ranks[layer.peft_name]
        alpha = layer.scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
        alphas[layer.peft_name], settings[layer.name] = alpha, (rank, alpha, layer.scale)
        cut, losses[layer.name] = _truncate_layer(layer, rank)
        (key, A), (key_b, B) = ((key, tensors[key]) for key in layer.keys)
        tensors[key] = cut[0].reshape(-1, *A.shape[1:]).to(A.dtype)
        tensors[key_b] = cut[1].reshape(B.shape[0], -1, *B.shape[2:]).to(B.dtype)
    config |= ranks_and_alphas(ranks, alphas)  # all of them, so that nothing depends on the order of patterns
    if is_from_weight(str(config.get("init_lora_weights"))):
        config["init_lora_weights"] = True  # the subtracted init is part of A and B
    metadata = {"format": "pt"}
    if record is not None:  # the parts of fused layers are merged into A and B
        digest, fields = fingerprint_of_tensors(tensors).digest, config_digests(config)
        metadata = replace(record, adapter=digest, settings=settings, config=fields, slices={}).to_metadata()
    after = {name: rank for name, (rank, _, _) in settings.items()}
    write_together(
        directory,
        {
            MARK: _json({"share": share, "ranks": after}),
            WEIGHTS: file_content(tensors, metadata),
            CONFIG: _json(config),
        },
    )
    return Truncation(
        directory=str(directory),
        share=share,
        ranks={layer.name: (layer.r, after[layer.name]) for layer in layers},
        errors={name: _error([loss]) for name, loss in losses.items()},
        error=_error(losses.values()),
        parameters=(sum(layer.parameters for layer in layers), sum(layer.cost(after[layer.name]) for layer in layers)),
    )


def _truncate_layer(layer: Factors, rank: int) -> tuple[Pair, Loss]:
    """A and B of `rank` in the file's order, and the loss of the update."""
    pairs, losses = [], []
    for A, B in layer.parts:
        (a, b), loss = truncate_pair(A.double(), B.double(), rank // layer.groups)
        # What was zero stays zero: rounding would let a group of channels see another's.
        a, b = a.masked_fill((A == 0).all(0), 0.0), b.masked_fill((B == 0).all(1, keepdim=True), 0.0)
        pairs.append(pad_pair((a, b), rank // layer.groups - len(a)))
        losses.append(loss)
    is_stack = layer.kind == "Parameter" and len(pairs) > 1
    columns = [b for _, b in pairs]
    B = torch.stack(columns, dim=2).flatten(1) if is_stack else torch.cat(columns)
    lost, whole = (sum(squares) * layer.scale**2 for squares in zip(*losses, strict=True))
    return (torch.cat([a for a, _ in pairs]), B), (lost, whole)


def _error(losses: Iterable[Loss]) -> float:
    lost, whole = map(sum, zip(*losses, strict=True))
    return math.sqrt(lost / whole) if whole else 0.0


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
