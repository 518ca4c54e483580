"""A debug mode: block tables are looked at before a kernel follows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qoqc.config import checks_pages
from qoqc.ir.spec import PAGE


def checked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, behind `require_pages` if that is switched on and qoqc::`name` has pages."""
    if not (checks_pages() and has_pages(name)):
        return call

    def check_first(*args: Any) -> Any:
        require_pages(name, args)
        return call(*args)

    return check_first


def has_pages(name: str) -> bool:
    """Does the op qoqc::`name` follow a block table?"""
    return "block_table" in _names(name)


def require_pages(name: str, args: tuple[Any, ...]) -> None:
    """Raise ValueError if a call of qoqc::`name` would read or write a page that there is not.

    Entries behind a sequence's last token are not looked at: nobody follows them. Waits for the
    device, so a step that is being captured as a CUDA graph is let pass.
    """
    named = dict(zip(_names(name), args, strict=False))  # arguments with defaults may be left out
    table, pages = named["block_table"], named["k_pages"].shape[0]
    if table.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    # appending ops get the tokens before, attention those with the new ones
    tokens = named["length"] if "length" in named else named["start"]
    if "k" in named:
        tokens = tokens + named["k"].shape[2]
    used = torch.arange(table.shape[1], device=table.device) * PAGE < tokens[:, None]
    wrong = (used & ((table < 0) | (table >= pages))).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"qoqc::{name}: block_table[{row}, {column}] is {int(table[row, column])}, but the "
            f"cache has {pages} pages; sequence {row} has {int(tokens[row])} tokens"
        )


def _names(name: str) -> list[str]:
    op = getattr(torch.ops.qoqc, name).default
    return [argument.name for argument in op._schema.arguments]
