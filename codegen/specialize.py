"""From a jitted template (Triton or Gluon) and its constexprs' values to a module that runs alone.

Branches on bound constexprs are decided on the syntax tree and cut from the text, so formatting
and comments of what stays survive. A pointer that a flag makes unused is still an argument: the
launcher passes any tensor for it, and the flag guards the load.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import math
import sys
import textwrap
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITCallable, KernelInterface

from qoqc.codegen.decide import UNKNOWN, evaluate
from qoqc.codegen.prune import Pruner

IMPORTS = "import torch\nimport triton\nimport triton.language as tl"
_JITTED = (JITCallable, KernelInterface)  # the second where Triton interprets
_MODULES = {"torch": torch, "triton": triton, "tl": tl}


def specialize(template: Any, constexprs: Mapping[str, Any]) -> str:
    """The source of a module with `template`, its constexprs bound, and all it calls.

    `constexprs` names every parameter of the template annotated `tl.constexpr`. Values are bool,
    int, float, str, None or a Triton dtype. The module imports torch, triton, triton.language and
    what else of Triton it needs. Raises ValueError for missing or unknown names, and for a global
    the module could not hold.
    """
    body = _bind(template, constexprs)
    pieces: dict[str, tuple[Any, str]] = {}
    _collect(body, template.fn, pieces)
    constants = [text for owner, text in pieces.values() if isinstance(owner, tl.constexpr)]
    helpers = [text for owner, text in pieces.values() if isinstance(owner, _JITTED)]
    known = (tl.constexpr, *_JITTED)
    imports = [text for owner, text in pieces.values() if not isinstance(owner, known)]
    head = "\n".join([IMPORTS, *_merged(imports)])
    top = "\n\n".join([head, *(["\n".join(constants)] if constants else [])])
    return "\n\n\n".join([top, *helpers, body]) + "\n"


def source_of(fn: Any) -> str:
    """The dedented source of a jitted function, decorators included."""
    source: str = inspect.getsource(fn.fn)
    return textwrap.dedent(source).rstrip()


def literal(value: Any) -> str:
    """`value` as the Python expression that gives it in a generated module."""
    value = value.value if isinstance(value, tl.constexpr) else value
    if isinstance(value, tl.dtype):
        names = [name for name, known in vars(tl).items() if known is value]
        return f"tl.{names[0]}"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str) and "\n" in value:
        return '"""' + value.replace("\\", "\\\\").replace('"""', '\\"""') + '"""'
    if isinstance(value, str):
        return json.dumps(value)
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    raise ValueError(f"{value!r} cannot be written as a constexpr: pass a number, str or tl.dtype")


def _bind(template: Any, constexprs: Mapping[str, Any]) -> str:
    """The source of the template alone, specialised."""
    source = source_of(template)
    fn = ast.parse(source).body[0]
    assert isinstance(fn, ast.FunctionDef)
    declared = {arg.arg for arg in fn.args.args if _is_constexpr(arg)}
    if declared != set(constexprs):
        missing, unknown = declared - set(constexprs), set(constexprs) - declared
        raise ValueError(
            f"{fn.name} takes the constexprs {sorted(declared)}; bind them all "
            f"(missing {sorted(missing)}, unknown {sorted(unknown)})"
        )
    overwritten = declared & _stored_names(fn)
    if overwritten or fn.args.defaults:
        raise ValueError(
            f"{fn.name} assigns to {sorted(overwritten)} or has default arguments; a template "
            "must leave its constexprs alone and take every argument from the launcher"
        )
    values = {**_constants(template.fn), **constexprs}
    head, body = Pruner(source, values).function()
    body = choose_operands(f"{head}\n{body}", values)[len(head) + 1 :]
    head = drop_parameters(head, declared)
    docstring, rest = _split_docstring(head, body)
    kept = ast.walk(ast.parse(f"{head}\n{body}"))
    used = {node.id for node in kept if isinstance(node, ast.Name)}
    bound = [f"    {n}: tl.constexpr = {literal(v)}" for n, v in constexprs.items() if n in used]
    return "\n".join([head, *docstring, *bound, *rest])


def _is_constexpr(arg: ast.arg) -> bool:
    return arg.annotation is not None and ast.unparse(arg.annotation).endswith("constexpr")


def _stored_names(fn: ast.FunctionDef) -> set[str]:
    nodes = (node for node in ast.walk(fn) if isinstance(node, ast.Name))
    return {node.id for node in nodes if isinstance(node.ctx, ast.Store)}


def _constants(fn: Any) -> dict[str, Any]:
    """The module-level constexprs a branch of `fn` may test."""
    return {k: v.value for k, v in fn.__globals__.items() if isinstance(v, tl.constexpr)}


def _split_docstring(head: str, body: str) -> tuple[list[str], list[str]]:
    """The lines of `body` that are the docstring, and the others."""
    tree = ast.parse(f"{head}\n{body}").body[0]
    assert isinstance(tree, ast.FunctionDef)
    lines = body.split("\n")
    if ast.get_docstring(tree) is None:
        return [], lines
    end = (tree.body[0].end_lineno or 0) - len(head.split("\n"))
    return lines[:end], lines[end:]


def _collect(text: str, fn: Any, pieces: dict[str, tuple[Any, str]]) -> None:
    """Add to `pieces` the constants and helpers that `text`, the source of `fn`, refers to.

    Helpers come before their callers.
    """
    tree = ast.parse(text).body[0]
    assert isinstance(tree, ast.FunctionDef)
    local = {arg.arg for arg in tree.args.args} | _stored_names(tree) | {tree.name}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or node.id in local or hasattr(builtins, node.id):
            continue
        # the lines that bind constexprs say `tl`, whether the template's module knows it or not
        name, value = node.id, fn.__globals__.get(node.id, _MODULES.get(node.id))
        if name in pieces:
            if pieces[name][0] is not value:
                raise ValueError(
                    f"{tree.name}: two different globals are called {name}; rename one"
                )
        elif isinstance(value, _JITTED):
            helper = source_of(value)
            _collect(helper, value.fn, pieces)
            pieces[name] = (value, helper)
        elif isinstance(value, tl.constexpr):
            pieces[name] = (value, f"{name} = tl.constexpr({literal(value)})")
        elif value is not _MODULES.get(name) or value is None:
            line = _import_of(name, value)
            if line is None:
                raise ValueError(
                    f"{tree.name} uses the global {name} = {value!r}; a template may use torch, "
                    "triton and what is in it, jitted helpers and module-level tl.constexpr values"
                )
            pieces[name] = (value, line)


def _merged(lines: Collection[str]) -> list[str]:
    """`from A import b` lines, those from one module as one."""
    names: dict[str, list[str]] = {}
    for line in sorted(lines):
        module, _, name = line.removeprefix("from ").partition(" import ")
        names.setdefault(module, []).append(name)
    return [f"from {module} import {', '.join(found)}" for module, found in names.items()]


def _import_of(name: str, value: Any) -> str | None:
    """The line that imports a module or function of triton's under the name it has here."""
    whole = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    if not isinstance(whole, str) or whole.split(".")[0] != "triton":
        return None
    if isinstance(value, ModuleType):
        parent, _, own = whole.rpartition(".")
        return f"from {parent} import {own}" + (f" as {name}" if own != name else "")
    if getattr(sys.modules[whole], name, None) is not value:
        return None
    return f"from {whole} import {name}"


def drop_parameters(head: str, names: Collection[str]) -> str:
    """A function header (decorators to colon) without the parameters `names`."""
    fn = ast.parse(head + "\n    pass").body[0]
    assert isinstance(fn, ast.FunctionDef)
    lines = head.split("\n")
    for arg in reversed(fn.args.args):
        if arg.arg not in names:
            continue
        row, start, end = arg.lineno - 1, arg.col_offset, arg.end_col_offset or 0
        before, after = lines[row][:start], lines[row][end:].lstrip(" ")
        after = after.removeprefix(",").lstrip(" ")
        if not before.strip() and (not after or after.startswith("#")):
            del lines[row]
        elif after.startswith(")"):
            lines[row] = before.rstrip(" ").removesuffix(",") + after
        else:
            lines[row] = before + after
    return "\n".join(lines)


def choose_operands(source: str, values: Mapping[str, Any]) -> str:
    """`source` with every `a if TEST else b` that `values` decide replaced by its operand."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.IfExp):
            continue
        picked = evaluate(node.test, values)
        if picked is UNKNOWN:
            continue
        operand = ast.get_source_segment(source, node.body if picked else node.orelse)
        whole = ast.get_source_segment(source, node)
        assert operand is not None and whole is not None
        lines = source.split("\n")
        rest = "\n".join(lines[node.lineno - 1 :])
        start = rest.index(whole)
        rest = rest[:start] + operand + rest[start + len(whole) :]
        return choose_operands("\n".join([*lines[: node.lineno - 1], rest]), values)
    return source
