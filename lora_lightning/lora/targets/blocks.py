"""The repeated blocks of any backbone: a transformer's layers, the bottlenecks of a ResNet's stages."""

from __future__ import annotations

import re

from torch import nn

from lora_lightning.lora.layers.class_swap import own_class
from lora_lightning.lora.layers.trained.module_copy import COPY

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
NUMBERED = re.compile(r"(.*\D)\d+")
"""Numbered names of children that form a list, such as `layer1`, `layer2`."""


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks by name: members of a list or sequence that has others of their class, or no other member.

    A block has children with parameters, so plain layers are none. Of nested blocks, such as a mixture's layers with
    experts, the outer ones count; stages of different widths are searched for blocks inside.
    """
    by_path: dict[str, nn.Module] = {}
    _search(model, "", by_path)
    return by_path


def _search(module: nn.Module, path: str, by_path: dict[str, nn.Module]) -> None:
    blocks = _candidates(module)
    for name, child in module._modules.items():
        if child is None or name == COPY:
            continue
        inner, before = f"{path}.{name}".removeprefix("."), len(by_path)
        if name not in blocks or not _is_repeated(child, blocks):
            _search(child, inner, by_path)
        if name in blocks and len(by_path) == before:  # a stage without blocks inside is a block
            by_path[inner] = child


def _candidates(parent: nn.Module) -> dict[str, nn.Module]:
    """Children that may be blocks: those that share their class with another, or a list's only member."""
    children = {n: m for n, m in parent._modules.items() if m is not None and n != COPY}
    composed = {n: m for n, m in children.items() if any(next(c.parameters(), None) is not None for c in m.children())}
    if isinstance(parent, CONTAINERS):
        kinds = {n: own_class(type(m)) for n, m in composed.items()}
        is_single = len(children) == 1
    else:
        stems = {n: match[1] for n in composed if (match := NUMBERED.fullmatch(n))}
        kinds, is_single = {n: (stem, own_class(type(composed[n]))) for n, stem in stems.items()}, False  # type: ignore[misc]
    every = list(kinds.values())
    return {n: composed[n] for n, kind in kinds.items() if every.count(kind) > 1 or is_single}


def _is_repeated(block: nn.Module, others: dict[str, nn.Module]) -> bool:
    """Whether most of the block's tensors have the same shape in another block of its class."""
    cls, shapes = own_class(type(block)), _shapes(block)
    for other in others.values():
        if other is not block and own_class(type(other)) is cls:
            other_shapes = _shapes(other)
            alike = sum(other_shapes.get(name) == shape for name, shape in shapes.items())
            if 2 * alike > min(len(shapes), len(other_shapes)):
                return True
    return False


def _shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in block.named_parameters()}
