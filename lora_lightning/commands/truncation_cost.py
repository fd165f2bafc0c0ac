"""What a truncated adapter costs: on a run's validation set, or on a probe drawn from what the base's config says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lightning.commands.adapter_sources import Source
from lora_lightning.export.compare import difference, outputs
from lora_lightning.export.probe_batch import draw
from lora_lightning.lora.errors import AdapterWarning, LoRAError
from lora_lightning.lora.formats.peft.load import load_adapter
from lora_lightning.lora.inject import disabled, remove
from lora_lightning.tasks.modes import evaluating


def cost_of(source: Source, directory: Path, *, allow_other_base: bool = False) -> dict[str, Any]:
    """The figures before and after, or how far outputs move; what is missing is said under `not_measured`.

    The source's model holds the truncated adapter afterwards.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)  # said when the adapter was opened
        if source.run is not None:
            return _on_run(source, directory)
        if source.base is None or source.adapter.files is None:
            return {"not_measured": "there is no base to measure on: give --base_model"}
        model: nn.Module = source.base.load(source.adapter.files)
        load_adapter(model, source.adapter.files.directory, allow_other_base=allow_other_base)
        return _on_probe(model, directory, allow_other_base=allow_other_base)


def _on_run(source: Source, directory: Path) -> dict[str, Any]:
    assert source.run is not None
    backbone = source.run.module.backbone
    if source.run.data is None:
        return _on_probe(backbone, directory, allow_other_base=True)
    before = source.run.validate()
    _exchange(backbone, directory, allow_other_base=True)
    return {"validation": {"before": before, "after": source.run.validate()}}


def _on_probe(model: nn.Module, directory: Path, *, allow_other_base: bool) -> dict[str, Any]:
    """Outputs of the base, of the adapted model and of the truncated one for the same random inputs."""
    with evaluating(model), torch.no_grad():
        try:
            probe = draw(model)
        except LoRAError as error:
            return {"not_measured": str(error)}
        full = outputs(model, probe.inputs)
        with disabled(model):
            plain = outputs(model, probe.inputs)
        _exchange(model, directory, allow_other_base=allow_other_base)
        cut = outputs(model, probe.inputs)
    return {
        "probe": {
            "inputs": probe.source,
            "adapter_moves": difference(full, plain, "the base").max_rel_diff,
            "truncation_moves": difference(full, cut, "the truncated adapter").max_rel_diff,
        }
    }


def _exchange(model: nn.Module, directory: Path, *, allow_other_base: bool) -> None:
    remove(model)
    load_adapter(model, directory, allow_other_base=allow_other_base)
