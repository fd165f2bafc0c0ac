"""Which modules of any backbone FSDP2 gathers together: its repeated blocks, found without knowing the architecture.

A block is a member of an `nn.ModuleList`, `nn.Sequential` or `nn.ModuleDict` that has another of its own class beside
it, and submodules of its own. Members that are lists themselves, as the stages of a convolutional network, are looked
into. Blocks within blocks are left alone: experts of a mixture are such, which not every process calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.lora.layers import SavedCopy
from lora_lightning.lora.layers.graft import own_class

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks by name, in the model's order, each once."""
    found: dict[str, nn.Module] = {}
    _look(model, "", found, set())
    return found


def named_blocks(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules whose names a pattern fits; `*` stands for anything.

    Raises:
        LoRAError: a pattern fits nothing, or what it fits has no parameters.
    """
    modules, found = dict(model.named_modules()), dict[str, nn.Module]()
    for pattern in patterns:
        fits = {name: module for name, module in modules.items() if name and fnmatchcase(name, pattern)}
        if not any(_has_parameters(module) for module in fits.values()):
            raise LoRAError(
                f"FSDP2Strategy.blocks: '{pattern}' fits no module with parameters{_near(pattern, modules)}"
            )
        found |= {name: module for name, module in fits.items() if _has_parameters(module)}
    return {name: found[name] for name in modules if name in found}


def _near(pattern: str, names: dict[str, nn.Module]) -> str:
    return did_you_mean(pattern, (name for name in names if name))


def _look(module: nn.Module, path: str, found: dict[str, nn.Module], seen: set[int]) -> None:
    """Walk down to the blocks; a trained copy and its original are one thing."""
    if id(module) in seen or isinstance(module, SavedCopy):
        return
    seen.add(id(module))
    children = list(module.named_children())
    kinds = Counter(own_class(type(child)) for _, child in children) if isinstance(module, LISTS) else Counter()
    for name, child in children:
        inside = f"{path}.{name}" if path else name
        is_repeated = kinds[own_class(type(child))] > 1 and id(child) not in seen and _can_be_block(child)
        count = len(found)
        if not is_repeated or type(child) in LISTS:
            _look(child, inside, found, seen)
        if is_repeated and len(found) == count and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            found[inside] = child
            seen.add(id(child))


def _can_be_block(module: nn.Module) -> bool:
    """Whether it has parameters in submodules: a single layer is too little to gather by itself."""
    return not isinstance(module, SavedCopy) and any(_has_parameters(child) for child in module.children())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
