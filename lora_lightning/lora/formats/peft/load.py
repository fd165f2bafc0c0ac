"""The only way in which an adapter is loaded: read, resolve, inject, fill.

`AdapterFiles.read` reads a directory, `resolve` translates its keys and config into the model's names and our config,
`inject_and_fill` injects the layers and loads their tensors. A warm start, a model on the meta device and loralib's
checkpoints use the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError, ConfigError, TargetError, first_few
from lora_lightning.lora.formats.peft.config import CONFIG, PICKLED, WEIGHTS, read_config, token_ids
from lora_lightning.lora.formats.peft.layout import from_peft
from lora_lightning.lora.formats.peft.resolve import Read, config_for, refuse_other_targets, resolve
from lora_lightning.lora.formats.provenance import Record, check_base, read_record
from lora_lightning.lora.formats.tensor_files import read_pickled, read_tensors
from lora_lightning.lora.frozen.tensors import adapter_tensors, get_module, refuse_misfits
from lora_lightning.lora.init import from_weight
from lora_lightning.lora.inject import inject, remove
from lora_lightning.lora.layers import Grafted
from lora_lightning.lora.report import InjectionReport


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    allow_other_base: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> InjectionReport:
    """Inject what a PEFT directory describes into a plain `model` and load its weights.

    Nothing but tensors is unpickled from an old `adapter_model.bin`. Ranks come from the tensors, alphas from PEFT's
    patterns. An adapter without a fingerprint of W0, as PEFT writes it, is loaded with a warning.

    Args:
        alphas: by full module name, where several entries of PEFT's `alpha_pattern` match a module: PEFT's file does
            not say which one was used in training. The error without them names the modules.

    Raises:
        AdapterError: a file is missing, torn or was changed since; a key is missing, left over or wrongly shaped;
            a setting has no counterpart here; the model has no module that the adapter names; the adapter was
            made on another W0 and `allow_other_base` is False. The model is then unchanged.
        LoRAError: the model is adapted already.
    """
    files = AdapterFiles.read(Path(directory))
    refuse_meta(model)
    check_base(files.record, model, allow_other_base=allow_other_base, replaced=files.peft.get("modules_to_save") or ())
    return load_files(model, files, allow_other_base=allow_other_base, alphas=alphas)


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """What an adapter's directory holds, read once."""

    directory: Path
    peft: dict[str, Any]
    tensors: dict[str, Tensor]
    """By their keys in the file."""
    record: Record | None
    """The record of `save_adapter`; None for a file that PEFT wrote."""

    @classmethod
    def read(cls, directory: Path) -> AdapterFiles:
        """Read `adapter_model.safetensors`, or else the old `adapter_model.bin`.

        An AdapterError where a file is missing, torn, changed since it was saved, or holds more than finite tensors.
        """
        peft = read_config(directory / CONFIG)
        weights, pickled, metadata = directory / WEIGHTS, directory / PICKLED, dict[str, str]()
        if weights.exists():
            tensors, metadata = read_tensors(weights)
        elif pickled.is_file():
            tensors = read_pickled(pickled)
        else:
            raise AdapterError(
                f"no file {weights}, and no {PICKLED} beside it: an adapter's directory holds one of them"
            )
        record = read_record(metadata)
        if record:
            record.refuse_changed(tensors, peft, directory)
        refuse_not_finite(tensors)
        return cls(directory=directory, peft=peft, tensors=tensors, record=record)


def refuse_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise an AdapterError with the list of all keys that hold a NaN or an infinity."""
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    wrong = [f"'{key}'" for key, tensor in floating.items() if not torch.isfinite(tensor.float()).all()]
    if wrong:
        raise AdapterError(
            f"the adapter holds values that are not finite, in {first_few(wrong, 10)}: use an earlier one"
        )


def refuse_meta(model: nn.Module, why: str = "would drop what is loaded") -> None:
    """Raise an AdapterError for a model whose tensors have no values yet."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise AdapterError(f"the model is on the meta device and {why}: give it its weights first")


def load_files(
    model: nn.Module,
    files: AdapterFiles,
    *,
    read: Read | None = None,
    make_real: Callable[[nn.Module], None] | None = None,
    allow_other_base: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> InjectionReport:
    """Resolve, inject and fill; the caller checks W0's fingerprint. After an error the model is unchanged.

    For a model on the meta device `read` reads W0's tensor with a name, and `make_real` allocates the adapter's memory.
    """
    contents = resolve(files.peft, files.tensors, model, read, allow_other_base=allow_other_base)
    refuse_other_targets(contents, model)
    return inject_and_fill(
        model,
        f"the adapter in {files.directory}",
        lambda: config_for(contents, files.record, model, alphas or {}),
        lambda: from_peft(model, contents.tensors, lambda name: token_ids(contents.peft, name)),
        make_real,
    )


def inject_and_fill(
    model: nn.Module,
    source: str,
    config: Callable[[], LoRAConfig],
    tensors: Callable[[], Mapping[str, Tensor]],
    make_real: Callable[[nn.Module], None] | None = None,
) -> InjectionReport:
    """Inject the config that `config` returns and load the tensors that `tensors` returns, by names in the model.

    Factors that an init subtracts are in no file: they are computed from W0, unless it is on the meta device. After an
    error the model is plain again and trains what it did before.
    """
    trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_plain = not any(isinstance(module, Grafted) for module in model.modules())
    try:
        settings = config()
        run_init = make_real is None and from_weight.is_from_weight(settings.init)
        report = inject(model, settings, run_init=run_init, any_rank=True)
        if make_real is not None:
            make_real(model)
        subtracted = {k: t for k, t in adapter_tensors(model).items() if k.endswith(("lora_A0", "lora_B0"))}
        load_tensors(model, {**subtracted, **tensors()})
    except BaseException as error:
        if was_plain:
            remove(model)
            for parameter in trained_before:
                parameter.requires_grad_(True)
        if isinstance(error, ConfigError | TargetError):
            raise AdapterError(f"{source} does not fit this model: {error}") from error
        raise
    return report


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the adapter's tensors, by their names, into an adapted model; an AdapterError where they do not fit.

    Copies of tied modules are tied here, but not in PEFT: where their values differ, they are untied.
    """
    current = adapter_tensors(model)
    refuse_misfits(current, tensors)
    first: dict[int, str] = {}
    for key, tensor in list(current.items()):
        twin = first.setdefault(id(tensor), key)
        if twin != key and not torch.equal(tensors[key], tensors[twin]):
            module, _, name = key.rpartition(".")
            current[key] = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            setattr(get_module(model, module), name, current[key])
    for key, tensor in current.items():
        tensor.data.copy_(tensors[key])
