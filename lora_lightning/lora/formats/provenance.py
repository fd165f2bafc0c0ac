"""The record that `save_adapter` writes into the file's metadata: the base, the adapter's digest, its settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, ConfigError, first_few, warn
from lora_lightning.lora.formats.peft.config import CONFIG, FIELDS, WEIGHTS, shorten
from lora_lightning.lora.formats.peft.layout import LayerLayout
from lora_lightning.lora.frozen.fingerprint import FORMAT, Fingerprint, fingerprint, fingerprint_of_tensors
from lora_lightning.lora.frozen.tensors import base_tensors
from lora_lightning.lora.targets.fused_projections import refuse_spec

PROVENANCE, CHECKSUM = "lora_lightning", "lora_lightning_sha256"

WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module)\.")
"""The parts that `torch.compile` and `DataParallel` add to names."""

FREE = {name for name, rule in FIELDS.items() if rule is None} - {"ensure_weight_tying"}
"""Fields of PEFT's config that may be edited, since they do not change what is loaded."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One adapter's record, by names in the backbone."""

    base: Fingerprint
    adapter: str
    """Digest of the file's tensors, in the format of `base`."""
    settings: dict[str, tuple[int, float, float]]
    """Rank and alpha with which the tensors are loaded, and the scale that PEFT gives them."""
    dropouts: dict[str, float]
    """Dropouts that differ from the most common one, which PEFT's config cannot hold."""
    slices: dict[str, Any]
    """The chosen parts of fused layers, in full form."""
    config: dict[str, str]
    """Digests of the fields of PEFT's config beside it."""

    def refuse_changed(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], directory: Path) -> None:
        """Raise an AdapterError where the files in `directory` were changed since they were saved."""
        if self.adapter != fingerprint_of_tensors(tensors).digest:
            raise AdapterError(f"{directory / WEIGHTS} was changed since it was saved: export or download it again")
        here = config_digests(config)
        if changed := sorted(n for n in {*here, *self.config} if here.get(n) != self.config.get(n)):
            fields = first_few([f"{name[:40]}={shorten(config.get(name))}" for name in changed])
            raise AdapterError(
                f"{directory / CONFIG} was changed since it was saved, in {fields}: put back what it said, or export or"
                f" download it again; {first_few(sorted(FREE), 8)} may be changed"
            )

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the file, with a checksum of the record itself."""
        text = json.dumps({"version": version("lora_lightning"), **asdict(self)}, sort_keys=True)
        return {"format": "pt", PROVENANCE: text, CHECKSUM: _sha256(text)}


def config_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """The start of each field's SHA-256; one that is null, false or empty counts as left out, and 3 equals 3.0."""
    stated = {n: v for n, v in config.items() if n not in FREE and not (v is None or v is False or v in ([], {}, ""))}
    plain = {name: json.loads(json.dumps(value), parse_int=float) for name, value in stated.items()}
    return {name: _sha256(json.dumps(value, sort_keys=True))[:16] for name, value in plain.items()}


def write_record(
    model: nn.Module,
    layouts: list[LayerLayout],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    digests: bool = True,
) -> dict[str, str]:
    """The metadata of a file with these tensors beside this config.

    Without `digests`, for tensors without values where only the length is needed, every digest is zeros.
    """
    blank = Fingerprint("0" * 64, {} if digests else dict.fromkeys(base_tensors(model), "0" * 16))
    dropouts = {one.name: one.layer.lora_settings.dropout for one in layouts}
    slices = {one.name: one.layer.lora_settings.slices for one in layouts if one.one_alpha is None}
    return Record(
        base=fingerprint(model) if digests else blank,
        adapter=fingerprint_of_tensors(tensors).digest if digests else blank.digest,
        settings={one.name: one.loaded_settings for one in layouts},
        dropouts={name: dropout for name, dropout in dropouts.items() if dropout != config["lora_dropout"]},
        slices={name: parts.to_spec() for name, parts in slices.items() if parts},
        config=config_digests(config),
    ).to_metadata()


def read_record(metadata: Mapping[str, str]) -> Record | None:
    """The inverse of `write_record`; None for PEFT's own file, an AdapterError for a record that cannot be read."""
    if PROVENANCE not in metadata and CHECKSUM not in metadata:
        return None
    try:
        record = json.loads(metadata[PROVENANCE])
        base = Fingerprint.from_json(json.dumps(record["base"]))
        if base.format != FORMAT:
            both = f"of format {base.format} and this version reads format {FORMAT}"
            raise ValueError(f"it is {both}; PEFT opens the adapter, and what it saves opens here")
        if metadata.get(CHECKSUM) != _sha256(metadata[PROVENANCE]):
            raise ValueError("it was changed since it was saved")
        for name, spec in record["slices"].items():
            refuse_spec(name, spec)
        settings = {name: (int(r), float(a), float(s)) for name, (r, a, s) in record["settings"].items()}
        others = {name: record[name] for name in ("adapter", "dropouts", "slices", "config")}
        return Record(base=base, settings=settings, **others)
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"the adapter's record of its base cannot be read ({str(error)[:200]})") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def check_base(
    record: Record | None, model: nn.Module, *, allow_other_base: bool, replaced: Collection[str] = ()
) -> None:
    """Refuse another base than the adapter's, but for modules in `replaced`, which it holds; warn without a record."""
    if record is None:
        warn_of_no_fingerprint()
    else:
        refuse_other_base(record.base, fingerprint(model), allow_other_base=allow_other_base, replaced=replaced)


def refuse_other_base(
    made_on: Fingerprint, here: Fingerprint, *, allow_other_base: bool = False, replaced: Collection[str] = ()
) -> None:
    """Refuse a W0 that is not the adapter's, with the tensors that differ; with `allow_other_base` warn of it."""
    # Older records of a wrapped model have `_orig_mod.` or `module.` in their names.
    plain = {WRAPPERS.sub("", name): name for name in here.tensors}
    renamed = {n: n if n in here.tensors else plain.get(WRAPPERS.sub("", n), n) for n in made_on.tensors}
    if len({*renamed.values()}) == len(renamed):
        made_on = replace(made_on, tensors={renamed[name]: digest for name, digest in made_on.tensors.items()})
    # A head that the adapter holds whole may be in one of the fingerprints only, here under each of its names.
    heads = tuple(f"{name}." for name in replaced)
    brought = {digest for name, digest in here.tensors.items() if name.startswith(heads)}
    names = [n for n in here.differences(made_on) if n in made_on.tensors or here.tensors[n] not in brought]
    names = [name for name in names if not name.startswith(heads)]
    if not names:
        return
    why = (
        f"the adapter was made on another base: W0 {made_on.digest[:12]} there, {here.digest[:12]} here;"
        f" {len(names)} of {len(here.tensors.keys() | made_on.tensors)} tensors differ, first {first_few(names)}"
    )
    if not allow_other_base:
        way_out = "pass allow_other_base=True (--model.allow_other_base true on the command line) to do without"
        raise AdapterError(f"{why}. Load the base that it was made on, or {way_out}")
    warn_of_other_base(why)


def warn_of_no_fingerprint() -> None:
    """Warn that an adapter has no fingerprint of its base."""
    warn(
        "this adapter notes no fingerprint of its base, as those of PEFT and loralib do not: whether it belongs to"
        " this one was not checked"
    )


def warn_of_other_base(why: str) -> None:
    """Warn that an adapter is loaded on another base, as `allow_other_base` permits."""
    warn(f"allow_other_base: {why}. Its outputs are not those that were trained")
