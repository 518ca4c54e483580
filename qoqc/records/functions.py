"""What a forward does: its code and that of the functions it calls, any of which may be patched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

Bodies = tuple[Any, ...]

PLAIN = (int, float, bool, str, type(None))


def bodies(function: Any) -> Bodies:
    """Names and code of `function` and of all that it calls by a global name, and they in turn.

    Followed are functions of its own package; of others, which is what patches bring along, the
    code itself. Functions that a decorator or a closure holds count as called. Not Python: ().
    """
    found: dict[FunctionType, None] = {}
    waiting = [function]
    package = _package(function)
    while waiting:
        each = waiting.pop()
        if not isinstance(each, FunctionType) or each in found:
            continue
        found[each] = None
        if _package(each) == package:
            waiting += [each.__globals__.get(name) for name in _names(each.__code__)]
            waiting += _held(each)
    return tuple((each.__module__, each.__qualname__, _body(each.__code__)) for each in found)


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _held(function: FunctionType) -> Iterator[Any]:
    yield getattr(function, "__wrapped__", None)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


@functools.cache
def _names(code: CodeType) -> tuple[str, ...]:
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(name for names in inner for name in names)]))


@functools.cache
def _body(code: CodeType) -> Bodies:
    """What a function does, and what the functions inside it do."""
    constants = tuple(
        _body(each) if isinstance(each, CodeType) else repr(each)
        for each in code.co_consts
        if isinstance(each, (*PLAIN, CodeType))
    )
    return (code.co_code.hex(), code.co_names, constants)
