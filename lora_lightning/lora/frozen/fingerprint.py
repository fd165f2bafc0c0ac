"""Proofs that W0 did not change: a fingerprint, which also identifies an adapter's base, and torch's counts of writes.

A fingerprint takes a second for each GiB. The counts take a millisecond and detect a merge, a `load_state_dict`, an
optimizer's step and updated running statistics. Moving a model to another device or dtype is no write: parameters stay
the same objects; buffers do not, and small ones are compared by their values.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.tensors import BaseTensor, base_tensors, iter_base

FORMAT = 2
"""The format of the digests below. Format 1 hashed each tensor as one piece."""
CHUNK = 1 << 24
"""Bytes that are hashed as one piece, so that one huge embedding uses all cores. Part of the format."""


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of all frozen tensors.

    A tensor's digest is SHA-256(dtype, shape, SHA-256 of each `CHUNK` of its bytes); the whole digest is
    SHA-256(name=digest, ...). Files, shards, memory layout and device have no influence; a tied weight counts under
    each of its names in the model, whether a file holds it once or twice.
    """

    digest: str
    tensors: dict[str, str]
    """By name, the first 16 hexadecimal digits of the tensor's digest, in the model's order."""
    format: int = FORMAT

    def differences(self, other: Fingerprint) -> list[str]:
        """Names of tensors that differ or that only one has: in this one's order, then those of the other only."""
        names = [*self.tensors, *(name for name in other.tensors if name not in self.tensors)]
        return [name for name in names if self.tensors.get(name) != other.tensors.get(name)]

    def to_json(self) -> str:
        """As text, for a file's metadata."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """The inverse of `to_json`; format 1 did not write its number."""
        values = json.loads(text)
        return cls(digest=str(values["digest"]), tensors=dict(values["tensors"]), format=int(values.get("format", 1)))


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of every tensor in the backbone's state dict but the originals of `modules_to_save`.

    Those are left out since the adapter holds them whole; a new head may start from other random numbers.

    Each call hashes all bytes, about 0.5 s per GiB: torch does not count writes through `.data` or numpy, so that no
    earlier digest can be trusted.
    """
    return fingerprint_of_tensors(base_tensors(model))


def fingerprint_of_tensors(tensors: Mapping[str, Tensor]) -> Fingerprint:
    """The fingerprint of tensors by name, as read from a file."""
    return fingerprint_of_digests(digests(tensors))


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Each tensor's digest, hexadecimal."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 2)) as pool:  # hashlib releases the GIL
        waiting = {name: _digest(tensor, pool) for name, tensor in tensors.items()}
        return {
            name: _sha256(header, *(piece.result() for piece in pieces)).hex()
            for name, (header, pieces) in waiting.items()
        }


def fingerprint_of_digests(by_name: Mapping[str, str]) -> Fingerprint:
    """The fingerprint of tensors whose digests are known, in the model's order."""
    whole = "".join(f"{name}={by_name[name]}\n" for name in sorted(by_name))
    return Fingerprint(_sha256(whole.encode()).hex(), {name: digest[:16] for name, digest in by_name.items()})


def _digest(tensor: Tensor, pool: Executor) -> tuple[bytes, list[Future[bytes]]]:
    """The header of a tensor's digest (dtype and shape), and the futures of its pieces' digests."""
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        raise ValueError("a tensor on the meta device has no bytes to take a fingerprint of")
    if is_traceable_wrapper_subclass(tensor):
        # torchao's quantized weights are composed of inner tensors.
        names, context = tensor.__tensor_flatten__()
        headers, futures = zip(*(_digest(getattr(tensor, name), pool) for name in names), strict=True)
        return b"".join([f"{context} {names}".encode(), *headers]), list(itertools.chain(*futures))
    # One worker makes the contiguous copy of a tensor that is not, so that few copies are in memory.
    pieces = _pieces(tensor) if tensor.is_contiguous() else [tensor]
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode(), [pool.submit(_hash_pieces, piece) for piece in pieces]


def _hash_pieces(tensor: Tensor) -> bytes:
    return b"".join(_sha256(piece.cpu().numpy().data) for piece in _pieces(tensor))


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor.contiguous().reshape(-1).view(torch.uint8), CHUNK) if tensor.numel() else []


def _sha256(*parts: bytes | memoryview) -> bytes:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.digest()


SMALL = 2**16
"""Largest number of entries of a buffer that is copied for comparison: statistics have a few thousand."""


class Version(NamedTuple):
    """The identity of a tensor of W0, how often it was written into, and a small buffer's values."""

    tensor: weakref.ref[Tensor]
    writes: int
    values: Tensor | None


def base_versions(model: nn.Module) -> dict[str, Version]:
    """The present versions of all of W0's tensors."""
    versions: dict[str, Version] = {}
    for place in iter_base(model):
        small = not place.is_parameter and place.tensor.numel() <= SMALL
        values = place.tensor.detach().clone() if small else None
        versions[place.name] = Version(weakref.ref(place.tensor), count_writes(place.tensor), values)
    return versions


def _fits(version: Version, now: BaseTensor) -> bool:
    """Whether a tensor is unchanged; a large buffer that was replaced counts as unchanged."""
    if version.tensor() is now.tensor:
        return count_writes(now.tensor) == version.writes
    if version.values is None:
        return not now.is_parameter
    return torch.equal(version.values.to(now.tensor), now.tensor)


def refuse_moved(model: nn.Module, before: dict[str, Version]) -> None:
    """Raise an AdapterError where a tensor of W0 was replaced or written into since `before`."""
    for place in iter_base(model):
        if place.name not in before or not _fits(before[place.name], place):
            raise AdapterError(
                f"W0 moved since the bank was made, first '{place.name}': a merge is the end of a bank, make a new one"
            )


def count_writes(tensor: Tensor) -> int:
    """The number of writes into the tensor; torch has no public name for it."""
    return 0 if tensor.is_inference() else tensor._version
