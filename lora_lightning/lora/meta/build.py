"""Build any module with its parameters on the meta device, to be filled from a safetensors file later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lora_lightning.lora.errors import LoRAError, first_few
from lora_lightning.lora.meta.checkpoint import INDEX, Checkpoint
from lora_lightning.lora.meta.key_mapping import WeightFiles, keep_files, names_by_tensor


def builds_bare() -> bool:
    """Whether torch's default device is `meta`, so that models are built without weights."""
    return torch.get_default_device().type == "meta"


def on_meta(make: Callable[[], nn.Module], weights: str | Path) -> nn.Module:
    """The module that `make` builds, in eval mode, without memory for its parameters.

    Each parameter goes to the meta device when it is registered, so that at most one is in memory at a time. Buffers
    stay real, and those in the files are loaded at once.

    Args:
        make: a class or a function without arguments.
        weights: a safetensors file, or a folder of them in the hub's layout, with the module's names.

    Raises:
        LoRAError: no such file; or the files lack a parameter, have one of another shape, or have an unknown key.
    """
    with _parameters_on_meta():
        model = make()
    path = Path(weights)
    folder = path.parent if path.name == INDEX else path
    files = WeightFiles([folder / name for name in Checkpoint(folder).files] if folder.is_dir() else [path])
    _check(model, files.checkpoint, path)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in files.checkpoint.stored:
                buffer.copy_(files.checkpoint.read(name))
    keep_files(model, files)
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter
    bare: Any = WeakIdKeyDictionary()  # so that a parameter registered twice stays one

    def without_numbers(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in bare:
                bare[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            parameter = bare[parameter]
        register(module, name, parameter)

    with patch.object(nn.Module, "register_parameter", without_numbers):
        yield


def _check(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    state, stored = model.state_dict(), checkpoint.stored
    problems = [f"no '{names[0]}'" for names in names_by_tensor(model) if not any(name in stored for name in names)]
    problems += [f"'{key}', which the module has not" for key in stored if key not in state]
    problems += [
        f"'{key}' of shape {stored[key].shape} instead of {tuple(state[key].shape)}"
        for key in stored
        if key in state and stored[key].shape != tuple(state[key].shape)
    ]
    if problems:
        raise LoRAError(f"{path} does not fit {type(model).__name__}: it has {first_few(problems)}")
