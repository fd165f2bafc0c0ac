"""Tensors of a file against those that a model expects: one error with the list."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lightning.lora.errors import AdapterError, did_you_mean, some


def refuse_misfits(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise an AdapterError with the list of all keys that are missing, left over, wrongly shaped or of no numbers."""
    problems = [f"missing '{key}'" for key in expected if key not in tensors]
    problems += [f"left over '{key}'{did_you_mean(key, expected)}" for key in tensors if key not in expected]
    both = {key: (tensor, tensors[key]) for key, tensor in expected.items() if key in tensors}
    problems += [
        f"'{key}' has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        for key, (want, got) in both.items()
        if got.shape != want.shape
    ]
    problems += [
        f"'{key}' holds {got.dtype}, expected {want.dtype}"
        for key, (want, got) in both.items()
        if got.dtype.is_floating_point != want.is_floating_point()
    ]
    if problems:
        raise AdapterError(f"the adapter does not fit this model ({len(problems)} keys): {some(problems, 10)}")


def refuse_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise an AdapterError with the list of all keys that hold a NaN or an infinity."""
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    wrong = [f"'{key}'" for key, tensor in floating.items() if not torch.isfinite(tensor.float()).all()]
    if wrong:
        raise AdapterError(f"the adapter holds values that are not finite, in {some(wrong, 10)}: use an earlier one")
