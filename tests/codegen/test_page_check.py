"""The debug mode that looks at block tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qoqc.codegen import dispatch, page_check
from qoqc.errors import OptionError
from qoqc.ir import ops
from qoqc.quant.kv import empty_pages

PAGES = 5


def _append(table: list[list[int]], start: list[int], new: int = 3) -> tuple[Any, ...]:
    pools = empty_pages(PAGES, 2, 16, 16, 4, torch.device("cpu"))
    k = torch.ones(len(start), 2, new, 16)
    return (*pools, torch.tensor(table, dtype=torch.int32), torch.tensor(start), k, k, 4)


def _attention(table: list[list[int]], length: list[int]) -> tuple[Any, ...]:
    pools, q = empty_pages(PAGES, 2, 16, 16, 4, torch.device("cpu")), torch.ones(1, 2, 1, 16)
    words = (torch.tensor(table, dtype=torch.int32), torch.tensor(length))
    return (q, *pools, *words, None, None, None, 1.0, 4, False)


def test_ops_with_block_tables() -> None:
    found = {name for name in dispatch.IMPLEMENTATIONS if page_check.has_pages(name)}
    assert found == {"kv4_append", "kv4_rotate_append", "kv4_attention", "kv4_decode"}


@pytest.mark.parametrize(
    ("table", "start"),
    [([[0, 99]], [61]), ([[4, 99]], [0]), ([[1, 2], [3, -1]], [100, 10]), ([[99, 0]], [-3])],
)
def test_what_is_not_followed_may_be_anything(table: list[list[int]], start: list[int]) -> None:
    page_check.require_pages("kv4_append", _append(table, start))


@pytest.mark.parametrize(
    ("table", "start", "message"),
    [
        ([[0, 5]], [62], r"block_table\[0, 1\] is 5, but the cache has 5 pages; .* 65 tokens"),
        ([[0, 1], [-1, 1]], [0, 0], r"block_table\[1, 0\] is -1"),
        ([[1000, 1]], [500], r"block_table\[0, 0\] is 1000"),
    ],
)
def test_pages_that_are_not_there(table: list[list[int]], start: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"qoqc::kv4_append: {message}"):
        page_check.require_pages("kv4_append", _append(table, start))


def test_attention_gets_lengths_with_the_new_tokens() -> None:
    page_check.require_pages("kv4_attention", _attention([[2, 7]], [64]))
    with pytest.raises(ValueError, match=r"kv4_attention: block_table\[0, 1\] is 7"):
        page_check.require_pages("kv4_attention", _attention([[2, 7]], [65]))


@pytest.mark.parametrize("value", ["0", "1"])
def test_it_is_on_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("QOQC_CHECK_PAGES", value)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "kv4_append", lambda *args: "launched")
    run = dispatch._late_bound("kv4_append")
    assert run(*_append([[0, 1]], [70])) == "launched"
    if value == "0":
        assert run(*_append([[0, 9]], [70])) == "launched"
    else:
        with pytest.raises(ValueError, match=r"block_table\[0, 1\] is 9"):
            run(*_append([[0, 9]], [70]))


def test_another_value_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQC_CHECK_PAGES", "yes")
    with pytest.raises(OptionError, match="QOQC_CHECK_PAGES='yes': expected 0 or 1"):
        dispatch._late_bound("kv4_append")


def test_on_a_cpu_torch_itself_refuses() -> None:
    with pytest.raises(IndexError):
        ops.kv4_append(*_append([[9, 0]], [0]))
