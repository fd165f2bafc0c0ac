"""What code may ask of a weight without using its values in a result: its type, its shape, whether it is finite."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]

QUESTIONS = {"dtype", "device", "shape", "size", "numel", "nelement", "ndim", "dim", "stride", "layout", "nbytes"}
QUESTIONS |= {"itemsize", "element_size", "requires_grad", "get_device", "is_cuda", "is_meta", "is_contiguous"}
QUESTIONS |= {"is_floating_point", "is_complex", "is_quantized", "is_sparse", "is_leaf", "isnan", "isinf", "isfinite"}
QUESTIONS |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
"""Of a weight, as its attributes or methods: `w.dtype`, `w.new_zeros(3)`."""

ASKERS = {"isinstance", "type", "id", "len", "is_tensor", "is_floating_point", "is_complex", "isnan", "isinf"}
ASKERS |= {"isfinite", "result_type", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
ASKERS |= {"to", "type_as", "view_as", "reshape_as", "expand_as"}
"""Functions and methods of another tensor, which take a weight for its type or shape: `x.to(w)`, `zeros_like(w)`."""

TELLERS = {"print", "debug", "info", "warning", "error"}
"""What comes of the values goes to a person, as under `assert` and `raise`."""


def looks(tree: ast.AST, function: Function, owner: type | None = None) -> set[ast.AST]:
    """Expressions in the source of `function` whose values go into nothing that is computed.

    With `owner`, the function's class, the helpers that it hands a weight to are judged by their source too.
    """
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in QUESTIONS:
            found.add(node.value)
        elif isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            found.update((node.left, *node.comparators))
        elif isinstance(node, ast.Assert | ast.Raise):
            found.update(ast.walk(node))
        elif isinstance(node, ast.Call):
            found |= _asked_by(node, function, owner)
    return found


def parsed(function: Function) -> ast.Module | None:
    """The function's source as a tree, where there is one."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def arguments(call: ast.Call) -> list[ast.expr]:
    """What a call takes, by position and by name."""
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _asked_by(call: ast.Call, function: Function, owner: type | None) -> set[ast.AST]:
    name = _last_name(call.func)
    if name in TELLERS:
        return {node for value in arguments(call) for node in ast.walk(value)}
    if name in ASKERS:
        return set(arguments(call))
    takes_weight = any(isinstance(value, ast.Attribute) and value.attr == "weight" for value in arguments(call))
    if owner is None or not takes_weight:  # reading a helper's source takes long
        return set()
    helper, bound = _helper(call.func, function, owner)
    return set() if helper is None else _only_asked(call, helper, bound)


def _last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _helper(called: ast.expr, function: Function, owner: type) -> tuple[Function | None, int]:
    """The plain Python function that the name stands for, and how many of its arguments the name brings."""
    code, bound, found = function.__code__, 0, None
    local = {*code.co_varnames, *code.co_freevars, *code.co_cellvars}
    if isinstance(called, ast.Name) and called.id not in local:
        found = function.__globals__.get(called.id)
    elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        if called.value.id == "self":
            found = inspect.getattr_static(owner, called.attr, None)
            found, bound = (found.__func__, 0) if isinstance(found, staticmethod) else (found, 1)
        elif inspect.ismodule(module := function.__globals__.get(called.value.id)):
            found = getattr(module, called.attr, None)
    plain = inspect.isfunction(found) and inspect.unwrap(found) is found
    return (found if plain else None), bound


def _only_asked(call: ast.Call, helper: Function, bound: int) -> set[ast.AST]:
    """Those arguments of the call of whose values the helper, by its own source, makes nothing."""
    tree = parsed(helper)
    definition = tree.body[0] if tree else None
    if tree is None or not isinstance(definition, ast.FunctionDef):
        return set()
    if any(isinstance(value, ast.Starred) for value in call.args):
        return set()
    parameters = definition.args
    positional = [one.arg for one in (*parameters.posonlyargs, *parameters.args)][bound:]
    named = {*positional, *(one.arg for one in parameters.kwonlyargs)}
    given = dict(zip(positional, call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg in named}
    asked = looks(tree, helper)  # what it hands on to a helper of its own counts as used
    used = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and node not in asked}
    return {value for name, value in given.items() if name not in used}
