"""The prompts of a large batch, some sequences at a time: less memory for activations."""

from __future__ import annotations

from typing import Any

import torch

from qoqc.decode.request import TOKEN_TYPES, Request
from qoqc.runtime.kv_cache import KV4Cache

TOKENS = 1 << 16
"""Of prompts computed at once: from some thousands on, more of them are not faster."""

ALIGN = 4
"""Slices begin at multiples of it: then their part of a cache begins where kernels may read 16
bytes at a time."""


def prefill(request: Request, kwargs: dict[str, Any]) -> torch.Tensor:
    """Run the prompts of a request through its model; the logits [B, V] behind their last tokens.

    kwargs  of the model's forward: the request's, or what became of them
    """
    slices = cut(request, kwargs)
    if len(slices) == 1:
        return _run(request, *slices[0])
    # copies: without logits_to_keep they are a part of those of the whole prompts
    logits = torch.cat([_run(request, ids, some).clone() for ids, some in slices])
    for layer in request.cache.layers:
        layer.empty = False
    return logits


def cut(request: Request, kwargs: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """(input_ids, kwargs) of each slice; of all at once where that is small, or asked for.

    Sequences of a cache that goes on, those whose prompts transformers is to cut into chunks, and
    those that come with more than tokens (nothing says whose images are whose) stay together.
    """
    ids, cache = request.input_ids, request.cache
    batch, length = ids.shape
    rows = rows_of(length)
    whole = not cache.layers[0].empty or request.config.prefill_chunk_size is not None
    whole = whole or not request.others <= TOKEN_TYPES
    # no slice of one sequence: there is another graph for it
    starts = [] if whole else list(range(0, batch - 1, rows))
    if len(starts) < 2:
        return [(ids, kwargs)]
    ends = [*starts[1:], batch]
    return [
        (ids[a:b], {k: _rows(v, batch, a, b) for k, v in kwargs.items()})
        for a, b in zip(starts, ends, strict=True)
    ]


def rows_of(length: int) -> int:
    """How many prompts of `length` tokens run at once."""
    return max(TOKENS // length // ALIGN * ALIGN, ALIGN)


def _rows(value: Any, batch: int, first: int, last: int) -> Any:
    """The part of the cache, or of a tensor that has one for each sequence; others as they are."""
    if isinstance(value, KV4Cache):
        return value.rows(first, last)
    own = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == batch
    return value[first:last] if own else value


def _run(request: Request, ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    outputs = request.model._prefill(ids, request.config, kwargs, is_first_iteration=True)
    logits: torch.Tensor = outputs.logits[:, -1]
    return logits
