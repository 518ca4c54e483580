"""What is said of a function changes with its code, and with that of what it calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from qoqc.records.functions import bodies


def inner(x: int) -> int:
    return x + 1


def outer(x: int) -> int:
    return inner(x)


def other_inner(x: int) -> int:
    return x + 2


def above(x: int) -> int:
    return outer(x)


def recursive(x: int) -> int:
    return recursive(x - 1) if x else inner(x)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


@decorated
def wrapped(x: int) -> int:
    return outer(x)


def in_a_comprehension(x: int) -> list[int]:
    return [inner(each) for each in range(x)]


@pytest.mark.parametrize("function", [outer, recursive, wrapped, in_a_comprehension])
def test_a_replaced_function_shows(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bodies(function)
    assert bodies(function) == before
    monkeypatch.setitem(globals(), "inner", other_inner)
    assert bodies(function) != before


def test_constants_and_inner_functions_show() -> None:
    def of(text: str) -> Any:
        space: dict[str, Any] = {"__name__": "tests"}
        exec(text, space)
        return bodies(space["f"])

    assert of("def f(x): return x + 1") != of("def f(x): return x + 2")
    assert of("def f(x): return lambda: x + 1") != of("def f(x): return lambda: x + 2")
    assert of("def f(x): return x + 1") == of("def f(x): return x + 1")


def test_functions_of_other_packages_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """But they are looked at: what a patch puts in their place is of another package."""
    assert [name for _, name, _ in bodies(above)] == ["above", "outer", "inner"]
    monkeypatch.setattr(outer, "__module__", "elsewhere")
    assert [name for _, name, _ in bodies(above)] == ["above", "outer"]


def test_what_is_no_function_has_no_body() -> None:
    assert bodies(len) == bodies(None) == bodies(functools.partial(inner)) == ()
