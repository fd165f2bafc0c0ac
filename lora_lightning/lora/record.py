"""What `save_adapter` notes in the file's metadata beside PEFT's own: the base, the adapter's digest, its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, ConfigError, some
from lora_lightning.lora.fingerprint import Fingerprint, fingerprint, of_tensors
from lora_lightning.lora.packing import Packed
from lora_lightning.lora.slices import check_spec

PROVENANCE, CHECKSUM = "lora_lightning", "lora_lightning_sha256"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One adapter's record, by names in the backbone."""

    base: Fingerprint
    """Of W0."""
    adapter: str
    """Digest of the file's tensors."""
    settings: dict[str, tuple[int, float, float]]
    """Rank and alpha that the tensors load as, and the scale that PEFT gives them."""
    dropouts: dict[str, float]
    """Dropouts that differ from the most common one, for which PEFT's config has no place."""
    slices: dict[str, Any]
    """The chosen parts of fused layers, written out in full."""


def write_record(
    model: nn.Module, packed: list[Packed], tensors: Mapping[str, Tensor], dropouts: dict[str, float]
) -> dict[str, str]:
    """The metadata of a file that holds `tensors`."""
    record = {
        "version": version("lora_lightning"),
        "base": json.loads(fingerprint(model).to_json()),
        "adapter": of_tensors(tensors).digest,
        "settings": {p.name: [*p.loads_as, p.scale] for p in packed},
        "dropouts": dropouts,
        "slices": {p.name: s.to_spec() for p in packed if (s := p.layer.lora_settings.slices) and p.one_alpha is None},
    }
    text = json.dumps(record, sort_keys=True)
    return {"format": "pt", PROVENANCE: text, CHECKSUM: _sha256(text)}


def read_record(metadata: Mapping[str, str]) -> Record | None:
    """The inverse; None in a file of PEFT's own.

    Raises:
        AdapterError: it cannot be read.
    """
    if PROVENANCE not in metadata and CHECKSUM not in metadata:
        return None
    try:
        if metadata.get(CHECKSUM) != _sha256(metadata[PROVENANCE]):
            raise ValueError("it was changed since it was saved")
        record = json.loads(metadata[PROVENANCE])
        slices = dict(record.get("slices", {}))
        for name, spec in slices.items():
            check_spec(name, spec)
        return Record(
            base=Fingerprint.from_json(json.dumps(record["base"])),
            adapter=str(record["adapter"]),
            settings={name: (int(r), float(a), float(s)) for name, (r, a, s) in record["settings"].items()},
            dropouts={name: float(p) for name, p in record.get("dropouts", {}).items()},
            slices=slices,
        )
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"the adapter's record of its base cannot be read ({str(error)[:200]})") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def refuse_other_base(made_on: Fingerprint, here: Fingerprint) -> None:
    """Raise where W0 is another than the adapter's, naming the tensors that differ."""
    different = made_on.differences(here)
    # A head that the adapter brings whole is in one of the two only.
    different = [n for n in different if n in made_on.tensors]
    if different:
        raise AdapterError(
            f"the adapter was made on another base: W0 {made_on.short} there, {here.short} here;"
            f" {len(different)} of {len(made_on.tensors)} tensors differ, first {some(different)}."
            f" Load the base that it was made on, or pass allow_other_base=True"
        )
