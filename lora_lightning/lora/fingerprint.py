"""A fingerprint of W0: proof that it did not move, and the address of the base that an adapter belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_lightning.lora.adapter import base_tensors


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of all frozen tensors."""

    digest: str
    """Hexadecimal, of the whole."""
    tensors: dict[str, str]
    """Name to the first 16 hexadecimal digits of that tensor's own digest."""

    @property
    def short(self) -> str:
        """Enough of `digest` to compare by eye."""
        return self.digest[:12]

    def differences(self, other: Fingerprint) -> list[str]:
        """Names of tensors that differ or that only one has, sorted."""
        names = sorted(self.tensors.keys() | other.tensors.keys())
        return [name for name in names if self.tensors.get(name) != other.tensors.get(name)]

    def to_json(self) -> str:
        """As text, for a file's metadata."""
        return json.dumps({"digest": self.digest, "tensors": self.tensors}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(digest=str(values["digest"]), tensors=dict(values["tensors"]))


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of every tensor in the backbone's own state dict, but for the originals of `modules_to_save`.

    Those are left out since the adapter brings them whole; a new head may start from other random numbers.
    """
    return of_tensors(base_tensors(model))


def of_tensors(tensors: Mapping[str, Tensor]) -> Fingerprint:
    """The same for tensors by name, as read from a file."""
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashlib lets go of the GIL
        digests = dict(zip(names, pool.map(lambda name: _digest(tensors[name]), names), strict=True))
    whole = hashlib.sha256("".join(f"{name}={digests[name]}\n" for name in names).encode())
    return Fingerprint(digest=whole.hexdigest(), tensors={name: d[:16] for name, d in digests.items()})


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        raise ValueError("a tensor on the meta device has no bytes to take a fingerprint of")
    if is_traceable_wrapper_subclass(tensor):
        # torchao's quantised weights are tensors made of tensors.
        names, context = tensor.__tensor_flatten__()
        parts = [_digest(getattr(tensor, name)) for name in names]
        return hashlib.sha256(f"{context} {names} {parts}".encode()).hexdigest()
    flat = tensor.cpu().contiguous().reshape(-1)
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()
