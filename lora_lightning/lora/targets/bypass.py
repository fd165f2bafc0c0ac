"""Parents that read a child's weight instead of calling the child: an adapter on that child would be ignored.

Found by reading what the parent's forward runs: Swin, BEiT, EVA and Mamba hand a weight on to a function, DeBERTa and
DETR take an embedding's table whole; so does torch's own attention, which has a form of its own here.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import CodeType

from torch import nn

from lora_lightning.lora.layers import kind_of
from lora_lightning.lora.layers.attention import host_refusal
from lora_lightning.lora.targets.looks import Function, arguments, looks, parsed

_KNOWN: dict[type[nn.Module], frozenset[str]] = {}


def bypassed_modules(names: dict[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Modules whose parent reads their weight and never calls them: an adapter there would be ignored."""
    bypassed: dict[nn.Module, str] = {}
    for module in names:
        if isinstance(module, nn.MultiheadAttention) and (reason := host_refusal(module)):
            bypassed |= {module: reason, module.out_proj: reason}
        for child in weights_passed_on(type(module)):
            read = module._modules.get(child)
            if read is not None and kind_of(read) is not None:
                reason = f"{type(module).__name__} reads its weight and may never call it, so an adapter there would be"
                bypassed.setdefault(
                    read, f"{reason} ignored: name '{child}.weight' in target_parameters, or leave it out"
                )
    return bypassed


def computed_modules(names: dict[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Modules under a parametrisation such as weight norm: an update folded into their weight would be lost."""
    reason = "its weight is computed from other parameters (a parametrisation), so no update can be folded into it"
    weights = {m: "in_proj_weight" if isinstance(m, nn.MultiheadAttention) else "weight" for m in names if kind_of(m)}
    return {m: reason for m, weight in weights.items() if weight not in m._parameters}


def weights_passed_on(parent: type[nn.Module]) -> frozenset[str]:
    """Names of children `c` for whose adapter the class's forward would not care.

    It uses `self.c.weight` as an argument or operand, or it reads `self.c.weight` in another way and never calls
    `self.c`. To look at its type, its shape or whether it is finite is neither.
    """
    if parent not in _KNOWN:
        functions = _run_by_forward(parent)
        readers = [
            (function, tree) for function in functions if "weight" in _names(function) and (tree := parsed(function))
        ]
        trees = [(tree, looks(tree, function, parent)) for function, tree in readers]
        used = {child for tree, asked in trees for child in _used(tree, asked)}
        read = {child for tree, asked in trees for child in _read(tree, asked)} - used
        if read:
            read -= {child for function in functions if (tree := parsed(function)) for child in _called(tree)}
        _KNOWN[parent] = frozenset(used | read)
    return _KNOWN[parent]


def _run_by_forward(parent: type[nn.Module]) -> list[Function]:
    """The forward methods that an instance runs, and the class's methods that these name, with those of `super()`."""
    methods = _methods(parent)
    reached = [name for name in methods if "forward" in name]
    for name in reached:  # grows while it is read
        named = {other for function in methods[name] for other in _names(function)}
        reached += [other for other in methods if other in named and other not in reached]
    return [function for name in reached for function in methods[name]]


def _methods(parent: type[nn.Module]) -> dict[str, list[Function]]:
    """Each method's code by name: the one that an instance has, and those that it reaches by `super()`."""
    found: dict[str, list[Function]] = {}
    overridden: set[str] = set()
    for cls in parent.__mro__:
        for name, attribute in vars(cls).items():
            if name in overridden or not inspect.isfunction(attribute):
                continue
            function = inspect.unwrap(attribute)
            if "__class__" not in function.__code__.co_freevars:  # the trace that `super()` leaves
                overridden.add(name)
            if not cls.__module__.startswith("torch."):
                found.setdefault(name, []).append(function)
    return found


def _names(function: Function) -> set[str]:
    """The attributes and globals that the code names; most name no weight, and reading source takes long."""
    codes, names = [function.__code__], set[str]()
    for code in codes:  # grows by the code of inner functions
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


def _child(node: ast.AST) -> str | None:
    """`c` where the node says `self.c`."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own else None  # type: ignore[attr-defined]


def _child_of_weight(node: ast.AST) -> str | None:
    """`c` where the node reads `self.c.weight`."""
    is_weight = isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)
    return _child(node.value) if is_weight else None  # type: ignore[attr-defined]


def _used(tree: ast.AST, asked: set[ast.AST]) -> Iterator[str]:
    """What a call takes or an operator works on."""
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call):
            values = arguments(node)
        elif isinstance(node, ast.BinOp):
            values = [node.left, node.right]
        yield from (child for value in values if value not in asked and (child := _child_of_weight(value)))


def _read(tree: ast.AST, asked: set[ast.AST]) -> Iterator[str]:
    """What is read in any way but a look at it."""
    yield from (child for node in ast.walk(tree) if node not in asked and (child := _child_of_weight(node)))


def _called(tree: ast.AST) -> Iterator[str]:
    yield from (child for node in ast.walk(tree) if isinstance(node, ast.Call) and (child := _child(node.func)))
