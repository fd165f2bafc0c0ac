"""What `save_adapter` notes in the file's metadata beside PEFT's own: the base, the adapter's digest, its settings."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, AdapterWarning, ConfigError, some
from lora_lightning.lora.formats.peft.config import HARMLESS, shown
from lora_lightning.lora.formats.peft.packing import Packed
from lora_lightning.lora.frozen.fingerprint import FORMAT, Fingerprint, fingerprint, of_tensors
from lora_lightning.lora.frozen.tensors import base_tensors
from lora_lightning.lora.targets.fused_projections import check_spec

PROVENANCE, CHECKSUM = "lora_lightning", "lora_lightning_sha256"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One adapter's record, by names in the backbone."""

    base: Fingerprint
    """Of W0."""
    adapter: str
    """Digest of the file's tensors, in the format of `base`."""
    settings: dict[str, tuple[int, float, float]]
    """Rank and alpha that the tensors load as, and the scale that PEFT gives them."""
    dropouts: dict[str, float]
    """Dropouts that differ from the most common one, for which PEFT's config has no place."""
    slices: dict[str, Any]
    """The chosen parts of fused layers, written out in full."""
    config: dict[str, str] | None = None
    """Digests of what PEFT's config said beside it, by field; None in records of older versions."""

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the file's tensors are as they were saved, as far as a digest of that format can tell."""
        return self.base.format != FORMAT or self.adapter == of_tensors(tensors).digest

    def refuse_changed(self, config: Mapping[str, Any], path: Path) -> None:
        """Raise an AdapterError where the config at `path` means another thing than it did when it was saved."""
        here = config_digests(config)
        before = here if self.config is None else self.config
        if changed := sorted(name for name in {*here, *before} if here.get(name) != before.get(name)):
            said = some([f"{name[:40]}={shown(config.get(name))}" for name in changed])
            raise AdapterError(
                f"{path} was changed since it was saved, in {said}: put back what it said, or export or download it"
                f" again; {some(sorted(FREE), 8)} may be changed"
            )


FREE = HARMLESS - {"ensure_weight_tying"}
"""Fields of PEFT's config that may be edited: they change nothing of what is loaded."""


def config_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """The first 16 hexadecimal digits of each field's SHA-256. What is null, false or empty is as if left out; 3 is
    3.0."""
    said = {n: v for n, v in config.items() if n not in FREE and not (v is None or v is False or v in ([], {}, ""))}
    plain = {name: json.loads(json.dumps(value), parse_int=float) for name, value in said.items()}
    return {name: _sha256(json.dumps(value, sort_keys=True))[:16] for name, value in plain.items()}


def write_record(
    model: nn.Module,
    packed: list[Packed],
    tensors: Mapping[str, Tensor],
    dropouts: dict[str, float],
    config: Mapping[str, Any],
    *,
    digests: bool = True,
) -> dict[str, str]:
    """The metadata of a file that holds `tensors` and lies beside `config`.

    Args:
        digests: False where there are no numbers, for the metadata's length alone: zeros then stand for W0's and the
            adapter's digests.
    """
    slices = {p.name: s.to_spec() for p in packed if (s := p.layer.lora_settings.slices) and p.one_alpha is None}
    settings = {p.name: (*p.loads_as, p.scale) for p in packed}
    if not digests:
        blank = dict.fromkeys(base_tensors(model), "0" * 16)
        return _metadata(Fingerprint("0" * 64, blank), "0" * 64, settings, dropouts, config, slices)
    return _metadata(fingerprint(model), of_tensors(tensors).digest, settings, dropouts, config, slices)


def rewritten(
    record: Record,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, tuple[int, float, float]],
    config: Mapping[str, Any],
) -> dict[str, str]:
    """The metadata of a file made from another's, for the same base: without parts, which are in A and B as they lie.

    Args:
        settings: as in `Record`.
    """
    return _metadata(record.base, of_tensors(tensors).digest, settings, record.dropouts, config, {})


def _metadata(
    base: Fingerprint,
    adapter: str,
    settings: Mapping[str, tuple[int, float, float]],
    dropouts: Mapping[str, float],
    config: Mapping[str, Any],
    slices: Mapping[str, Any],
) -> dict[str, str]:
    record = {
        "version": version("lora_lightning"),
        "base": json.loads(base.to_json()),
        "adapter": adapter,
        "settings": {name: list(own) for name, own in settings.items()},
        "dropouts": dropouts,
        "config": config_digests(config),
        "slices": slices,
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
        record = json.loads(metadata[PROVENANCE])
        # A record of the first format had no checksum, and is told by its fingerprint's.
        if (CHECKSUM in metadata or "format" in record["base"]) and metadata.get(CHECKSUM) != _sha256(
            metadata[PROVENANCE]
        ):
            raise ValueError("it was changed since it was saved")
        slices = dict(record.get("slices", {}))
        for name, spec in slices.items():
            check_spec(name, spec)
        return Record(
            base=Fingerprint.from_json(json.dumps(record["base"])),
            adapter=str(record["adapter"]),
            settings={name: (int(r), float(a), float(s)) for name, (r, a, s) in record["settings"].items()},
            dropouts={name: float(p) for name, p in record.get("dropouts", {}).items()},
            slices=slices,
            config={name: str(d) for name, d in record["config"].items()} if "config" in record else None,
        )
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"the adapter's record of its base cannot be read ({str(error)[:200]})") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def check_base(
    record: Record | None, model: nn.Module, *, allow_other_base: bool, replaced: Collection[str] = ()
) -> None:
    """Raise where the plain `model` is another base than the one that the adapter was made on.

    Args:
        record: None, of an adapter that notes no base, gives a notice.
        replaced: modules that the adapter brings whole.
    """
    if record is None:
        warn_of_no_fingerprint(4)
    else:
        refuse_other_base(record.base, fingerprint(model), allow_other_base=allow_other_base, replaced=replaced)


def refuse_other_base(
    made_on: Fingerprint, here: Fingerprint, *, allow_other_base: bool = False, replaced: Collection[str] = ()
) -> None:
    """Raise where W0 is another than the adapter's, naming the tensors that differ in the model's own order.

    With `allow_other_base` it warns instead.

    Raises:
        AdapterError: another base, or one whose fingerprint is of another format.
    """
    told = _told_apart(made_on, here, replaced)
    if told and not allow_other_base:
        way_out = "pass allow_other_base=True (--model.allow_other_base true on the command line) to do without"
        raise AdapterError(f"{told}. Load the base that it was made on, or {way_out}")
    if told:
        warn_of_other_base(told, 5)


def warn_of_no_fingerprint(stacklevel: int) -> None:
    """What is said of an adapter that notes nothing of its base."""
    warnings.warn(
        "this adapter notes no fingerprint of its base, as those of PEFT and loralib do not: whether it belongs to"
        " this one was not checked",
        AdapterWarning,
        stacklevel=stacklevel,
    )


def warn_of_other_base(told: str, stacklevel: int) -> None:
    """What is said of an adapter that is loaded on another base than its own, as it was asked for."""
    warnings.warn(
        f"allow_other_base: {told}. Its outputs are not those that were trained", AdapterWarning, stacklevel=stacklevel
    )


def unknown_format(made_on: Fingerprint) -> str | None:
    """Why a fingerprint cannot be compared with those of this version, None where it can."""
    if made_on.format == FORMAT:
        return None
    return (
        f"the adapter notes its base by a fingerprint of format {made_on.format}, this version of lora_lightning takes"
        f" format {FORMAT}: whether this is that base cannot be told"
    )


def _told_apart(made_on: Fingerprint, here: Fingerprint, replaced: Collection[str]) -> str | None:
    """What a person is told of two bases, None where they are one."""
    if unknown := unknown_format(made_on):
        return unknown
    # A head that the adapter brings whole is here alone, under each of its names.
    heads = tuple(f"{name}." for name in replaced)
    brought = {digest for name, digest in here.tensors.items() if name.startswith(heads)} if heads else set()
    different = [n for n in here.differences(made_on) if n in made_on.tensors or here.tensors[n] not in brought]
    if not different:
        return None
    return (
        f"the adapter was made on another base: W0 {made_on.short} there, {here.short} here;"
        f" {len(different)} of {len(here.tensors)} tensors differ, first {some(different)}"
    )
