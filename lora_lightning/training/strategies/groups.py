"""Which modules of any backbone FSDP gathers together: its repeated blocks, or those that are named."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.training.activations.blocks import repeated_blocks


def groups_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks that can be called: a bare list has no forward before which it could be gathered."""
    lists = (nn.ModuleList, nn.ModuleDict)
    return {name: block for name, block in repeated_blocks(model).items() if not isinstance(block, lists)}


def named_blocks(model: nn.Module, patterns: Sequence[str], of: str = "FSDP2Strategy") -> dict[str, nn.Module]:
    """The modules whose names a pattern fits; `*` stands for anything.

    Raises:
        LoRAError: a pattern fits nothing, or what it fits has no parameters.
    """
    modules, found = dict(model.named_modules()), dict[str, nn.Module]()
    for pattern in patterns:
        fits = {name: module for name, module in modules.items() if name and fnmatchcase(name, pattern)}
        if not any(_has_parameters(module) for module in fits.values()):
            raise LoRAError(f"{of}.blocks: '{pattern}' fits no module with parameters{_near(pattern, modules)}")
        found |= {name: module for name, module in fits.items() if _has_parameters(module)}
    return {name: found[name] for name in modules if name in found}


def _near(pattern: str, names: dict[str, nn.Module]) -> str:
    return did_you_mean(pattern, (name for name in names if name))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
