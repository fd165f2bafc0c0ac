"""Opens adapters for `analyze`: a directory of ours or PEFT's, an export, a run, a checkpoint."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from lora_lightning.analysis.adapters import Adapter, read_factors
from lora_lightning.analysis.base_weights import Weights, add_starts
from lora_lightning.backbones.checkpoint import CONFIG as MODEL_CONFIG
from lora_lightning.backbones.checkpoint import BaseFiles
from lora_lightning.backbones.key_mapping import groups_of
from lora_lightning.backbones.locate import resolve
from lora_lightning.cli.build import Run, open_run
from lora_lightning.export.model_files import is_transformers
from lora_lightning.lora.errors import AdapterError, AdapterWarning, LoRAError
from lora_lightning.lora.formats.peft.config import CONFIG, PICKLED, WEIGHTS, subtracted_init
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.formats.peft.save import save_adapter
from lora_lightning.lora.formats.provenance import Record
from lora_lightning.lora.meta.key_mapping import Base, BaseCheck
from lora_lightning.training.checkpoints import run_folder as run

AUTO, NONE = "auto", "none"


@dataclass
class Source:
    """One adapter with its base and its run, where they are available."""

    adapter: Adapter
    weights: Weights | None = None
    """W0; None where it is not available."""
    run: Run | None = None
    notes: list[str] = field(default_factory=list)
    """What is missing, and why."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options for all adapters."""

    base_model: str = AUTO
    """A directory; `auto`: what the adapter or the run names, where it exists; `none`."""
    allow_other_base: bool = False
    alphas: Mapping[str, float] | None = None


def labels_of(paths: list[str]) -> list[str]:
    """A short name for each path: as many of its last parts as tell the paths apart."""
    parts = [Path(path).absolute().parts for path in paths]
    while len(set(parts)) > 1 and len({names[-1:] for names in parts}) == 1 and all(len(names) > 2 for names in parts):
        parts = [names[:-1] for names in parts]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(names[-count:]) for names in parts]
        if len(set(labels)) == len(set(parts)):
            return labels
    return paths


def open_source(path: str, label: str, wanted: SourceOptions) -> Source:
    """Open the adapter at `path`.

    Raises:
        LoRAError: there is no adapter, it is damaged, or it does not belong to its base.
    """
    folder = Path(resolve(path))
    for directory in (folder, folder / "adapter"):
        if any((directory / name).is_file() for name in (CONFIG, WEIGHTS, PICKLED)):
            return _directory(directory, label, wanted)
    try:
        checkpoint = run.find_checkpoint(folder)
    except LoRAError as error:
        raise AdapterError(f"'{path}' is no adapter's directory (with {CONFIG}) and no run: {error}") from error
    return _checkpoint(checkpoint, label, wanted)


def _directory(directory: Path, label: str, wanted: SourceOptions) -> Source:
    files = AdapterFiles.read(directory)
    base, note = _base_of(files, wanted)
    weights = None if base is None else weights_in(base, files, allow_other_base=wanted.allow_other_base)
    factors, tensors = read_factors(files, wanted.alphas, None if weights is None else weights.modules)
    if weights is not None and wanted.base_model == AUTO:
        try:
            for layer in factors:
                weights.place(layer)
        except AdapterError as error:
            weights, note = None, f"without W0: {error}"
    factors = add_starts(factors, subtracted_init(files.peft), weights)
    adapter = Adapter(label=label, source=str(directory), factors=factors, files=files, tensors=tensors)
    return Source(adapter, weights, notes=[note] if note else [])


def _base_of(files: AdapterFiles, wanted: SourceOptions) -> tuple[BaseFiles | None, str]:
    """The files of W0, or why there are none."""
    if wanted.base_model == NONE:
        return None, ""
    if wanted.base_model != AUTO:
        return BaseFiles(Path(resolve(wanted.base_model))), ""
    named = files.peft.get("base_model_name_or_path")
    try:
        directory = Path(resolve(str(named))) if named else None
        if directory is not None and (directory / MODEL_CONFIG).is_file():
            return BaseFiles(directory), ""
    except (LoRAError, OSError) as error:
        return None, f"without W0: {error}"
    reason = f"'{named}', which its config names, is no directory here" if named else "its config names no base"
    return None, f"without W0, so without amplification: {reason}; --base_model gives one"


def weights_in(base: BaseFiles, files: AdapterFiles, *, allow_other_base: bool = False) -> Weights:
    """W0 read tensor by tensor from a base's files, each compared with the adapter's record of it."""
    make, _ = base.maker(files)
    plain = make()
    tensors = Base(base.checkpoint, groups_of(make(), base.checkpoint), plain)
    tensors.untie_unequal(plain)
    check = _check(files.record, tensors, plain, allow_other_base=allow_other_base)

    def read(name: str) -> Tensor | None:
        source = tensors.source(name)
        if source is not None and check is not None:
            check.see(tensors.of_name[source])
            check.refuse(whole=False)
        return None if source is None else tensors(name)

    return Weights(plain, read)


def _check(record: Record | None, base: Base, plain: nn.Module, *, allow_other_base: bool) -> BaseCheck | None:
    """None where another base is allowed, or the adapter has no record."""
    if record is None or allow_other_base:
        return None
    keys, prefix = plain.state_dict().keys(), f"{getattr(plain, 'base_model_prefix', '')}."
    # The adapted model may have a head that it did not train, and the base's class none.
    expected = {n if n in keys else n.removeprefix(prefix): digest for n, digest in record.base.tensors.items()}
    return BaseCheck(expected, base, {name for name, _ in plain.named_buffers()})


def _checkpoint(checkpoint: Path, label: str, wanted: SourceOptions) -> Source:
    """Open a run's checkpoint with the model that its config describes."""
    if wanted.base_model not in (AUTO, NONE):
        raise LoRAError(f"'{checkpoint}' is of a run, whose config names its base: leave --base_model out, or say none")
    try:
        opened = open_run(checkpoint)
    except LoRAError as error:
        raise LoRAError(
            f"'{checkpoint}' is analysed with the model that its run's config describes, and that cannot be opened"
            f" ({error}): analyse an adapter's directory, which `lora-lightning export` writes, with --base_model none"
        ) from error
    source = _source_of_run(opened, checkpoint, label)
    return source if wanted.base_model == AUTO else replace(source, weights=None)


def _source_of_run(opened: Run, checkpoint: Path, label: str) -> Source:
    """A run's adapter in PEFT's format, which is analysed and truncated."""
    backbone, task = opened.module.backbone, opened.module.task
    task_type = task.peft_task_type if is_transformers(backbone) else None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)  # about PEFT's reading, which does not happen here
        save_adapter(backbone, folder, task_type=task_type)
        files = AdapterFiles.read(Path(folder))
    weights = Weights(backbone)
    factors, tensors = read_factors(files, modules=weights.modules)
    adapter = Adapter(label=label, source=str(checkpoint), factors=factors, files=files, tensors=tensors)
    return Source(adapter, weights, run=opened)
