"""Opens adapters for `analyze`: a directory of ours or PEFT's, an export, a run, a checkpoint."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lora_lightning.analysis.adapters import Adapter, read_factors
from lora_lightning.analysis.base_weights import Weights, add_starts
from lora_lightning.backbones.checkpoint import CONFIG as MODEL_CONFIG
from lora_lightning.backbones.checkpoint import BaseFiles, groups_of
from lora_lightning.backbones.locate import resolve
from lora_lightning.cli.build import Run, open_run
from lora_lightning.export.model_files import is_transformers
from lora_lightning.lora.errors import AdapterError, AdapterWarning, LoRAError
from lora_lightning.lora.formats.peft.config import CONFIG, PICKLED, WEIGHTS, subtracted_init
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.formats.peft.save import save_adapter
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


def open_source(
    path: str,
    label: str,
    base_model: str = AUTO,
    allow_other_base: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> Source:
    """Open the adapter at `path`.

    Args:
        label: its name in tables and figures.
        base_model: a directory; `auto`: what the adapter or the run names, where it exists; `none`.
        allow_other_base: whether the adapter may have been made on another base.
        alphas: as in `load_adapter`.

    Raises:
        LoRAError: there is no adapter, it is damaged, or it does not belong to its base.
    """
    folder = Path(resolve(path))
    for directory in (folder, folder / "adapter"):
        if any((directory / name).is_file() for name in (CONFIG, WEIGHTS, PICKLED)):
            return _open_directory(directory, label, base_model, allow_other_base, alphas)
    try:
        checkpoint = run.find_checkpoint(folder)
    except LoRAError as error:
        raise AdapterError(f"'{path}' is no adapter's directory (with {CONFIG}) and no run: {error}") from error
    return _open_checkpoint(checkpoint, label, base_model)


def _open_directory(
    directory: Path, label: str, base_model: str, allow_other_base: bool, alphas: Mapping[str, float] | None
) -> Source:
    files = AdapterFiles.read(directory)
    base, note = _base_of(files, base_model)
    weights = None if base is None else _weights_in(base, files, allow_other_base)
    factors, tensors = read_factors(files, alphas, None if weights is None else weights.modules)
    if weights is not None and base_model == AUTO:
        try:
            for layer in factors:
                weights.place(layer)
        except AdapterError as error:
            weights, note = None, f"without W0: {error}"
    factors = add_starts(factors, subtracted_init(files.peft), weights)
    adapter = Adapter(label=label, source=str(directory), factors=factors, files=files, tensors=tensors)
    return Source(adapter, weights, notes=[note] if note else [])


def _base_of(files: AdapterFiles, base_model: str) -> tuple[BaseFiles | None, str]:
    """The files of W0, or why there are none."""
    if base_model == NONE:
        return None, ""
    if base_model != AUTO:
        return BaseFiles(Path(resolve(base_model))), ""
    named = files.peft.get("base_model_name_or_path")
    try:
        directory = Path(resolve(str(named))) if named else None
        if directory is not None and (directory / MODEL_CONFIG).is_file():
            return BaseFiles(directory), ""
    except (LoRAError, OSError) as error:
        return None, f"without W0: {error}"
    reason = f"'{named}', which its config names, is no directory here" if named else "its config names no base"
    return None, f"without W0, so without amplification: {reason}; --base_model gives one"


def _weights_in(base: BaseFiles, files: AdapterFiles, allow_other_base: bool) -> Weights:
    """W0 read tensor by tensor from a base's files, each compared with the adapter's record of it, if it has one."""
    make, _ = base.maker(files)
    plain = make()
    tensors = Base(base.checkpoint, groups_of(make(), base.checkpoint), plain)
    tensors.untie_unequal(plain)
    check: BaseCheck | None = None
    if files.record is not None and not allow_other_base:
        keys, prefix = plain.state_dict().keys(), f"{getattr(plain, 'base_model_prefix', '')}."
        # The adapted model may have a head that it did not train, and the base's class none.
        recorded = files.record.base.tensors
        expected = {name if name in keys else name.removeprefix(prefix): digest for name, digest in recorded.items()}
        check = BaseCheck(expected, tensors, {name for name, _ in plain.named_buffers()})

    def read(name: str) -> Tensor | None:
        source = tensors.source(name)
        if source is not None and check is not None:
            check.see(tensors.of_name[source])
            check.refuse(whole=False)
        return None if source is None else tensors(name)

    return Weights(plain, read)


def _open_checkpoint(checkpoint: Path, label: str, base_model: str) -> Source:
    """A run's adapter on the model that its config describes; in PEFT's format, which is analysed and truncated."""
    if base_model not in (AUTO, NONE):
        raise LoRAError(f"'{checkpoint}' is of a run, whose config names its base: leave --base_model out, or say none")
    try:
        opened = open_run(checkpoint)
    except LoRAError as error:
        raise LoRAError(
            f"'{checkpoint}' is analysed with the model that its run's config describes, and that cannot be opened"
            f" ({error}): analyse an adapter's directory, which `lora-lightning export` writes, with --base_model none"
        ) from error
    backbone = opened.module.backbone
    task_type = opened.module.task.peft_task_type if is_transformers(backbone) else None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)  # about PEFT's reading, which does not happen here
        save_adapter(backbone, folder, task_type=task_type)
        files = AdapterFiles.read(Path(folder))
    weights = Weights(backbone)
    factors, tensors = read_factors(files, modules=weights.modules)
    adapter = Adapter(label=label, source=str(checkpoint), factors=factors, files=files, tensors=tensors)
    return Source(adapter, weights if base_model == AUTO else None, run=opened)
