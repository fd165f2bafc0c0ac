"""Adapters whose spectra, directions and amplification are known, made with numpy and written as files by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

PREFIX = "base_model.model."


def frame(rng, n, q):
    """q orthonormal columns of n numbers."""
    return np.linalg.qr(rng.standard_normal((n, q)))[0]


def factors(rng, U, S, V, r, scale):
    """A (r, k) and B (m, r) with `scale B A = U diag(S) V^T`, mixed so that no row of A is a direction."""
    q = len(S)
    mix = rng.standard_normal((q, r))  # (q, r) of full rank, with its right inverse
    A = np.linalg.pinv(mix) @ (np.sqrt(S)[:, None] * V.T)
    B = (U * (np.sqrt(S) / scale)) @ mix
    return A, B


def write(directory: Path, layers, *, r, alpha, **config):
    """`layers`: A and B by module; as PEFT writes them."""
    directory.mkdir(parents=True)
    tensors = {}
    for name, (A, B) in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(A)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(B)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    ends = sorted({name.rpartition(".")[2] for name in layers})
    said = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": ends, **config}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory
