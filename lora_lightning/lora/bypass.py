"""Parents that hand a child's weight on instead of calling the child: an adapter on that child would be ignored.

Found by reading the parent's forward: Swin, BEiT, EVA and Mamba do so, and torch's own attention, which has a form of
its own here.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_KNOWN: dict[type[nn.Module], frozenset[str]] = {}


def weights_passed_on(parent: type[nn.Module]) -> frozenset[str]:
    """Names of children `c` for which a forward of the class uses `self.c.weight` as an argument or operand."""
    if parent not in _KNOWN:
        _KNOWN[parent] = frozenset(child for forward in _forwards(parent) for child in _passed_on(forward))
    return _KNOWN[parent]


def _forwards(parent: type[nn.Module]) -> list[Callable[..., Any]]:
    """The forward methods that an instance runs, with those that they reach by `super()`."""
    found: list[Callable[..., Any]] = []
    overridden: set[str] = set()
    for cls in parent.__mro__:
        for name, attribute in vars(cls).items():
            if "forward" not in name or name in overridden or not inspect.isfunction(attribute):
                continue
            function = inspect.unwrap(attribute)
            if "__class__" not in function.__code__.co_freevars:  # the trace that `super()` leaves
                overridden.add(name)
            if not cls.__module__.startswith("torch."):
                found.append(function)
    return found


def _passed_on(forward: Callable[..., Any]) -> Iterator[str]:
    if "weight" not in forward.__code__.co_names:  # most do not, and reading source takes long
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return
    for node in ast.walk(tree):
        for value in _used(node):
            if (
                isinstance(value, ast.Attribute)
                and value.attr == "weight"
                and isinstance(value.value, ast.Attribute)
                and isinstance(value.value.value, ast.Name)
                and value.value.value.id == "self"
            ):
                yield value.value.attr


def _used(node: ast.AST) -> list[ast.expr]:
    """What a call takes or an operator works on; asking for a type is no use of the values."""
    if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    return [node.left, node.right] if isinstance(node, ast.BinOp) else []
