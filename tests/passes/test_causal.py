"""Only a mask that is causal whatever is passed becomes SDPA's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qoqc.passes.causal import causal
from qoqc.passes.match import SDPA, is_call
from qoqc.passes.normalize import normalize
from qoqc.testing import capture, context, run_graph

Mask = Callable[[Tensor, int, int], Tensor]


def key_first(x: Tensor, queries: int, keys: int) -> Tensor:
    q, k = torch.arange(queries) + 0, torch.arange(keys) + 0
    return (k[None, None, None, :] <= q[None, None, :, None]).expand(len(x), -1, queries, keys)


def query_first(x: Tensor, queries: int, keys: int) -> Tensor:
    return torch.arange(queries)[:, None] >= torch.arange(keys)[None]


def shifted(x: Tensor, queries: int, keys: int) -> Tensor:
    return torch.arange(keys)[None] <= torch.arange(queries)[:, None] + 1


def strict(x: Tensor, queries: int, keys: int) -> Tensor:
    return torch.arange(keys)[None] < torch.arange(queries)[:, None] + 1


def swapped(x: Tensor, queries: int, keys: int) -> Tensor:
    return torch.arange(keys)[None] >= torch.arange(queries)[:, None]


def cut(x: Tensor, queries: int, keys: int) -> Tensor:
    return torch.arange(keys + 1)[None, 1:] <= torch.arange(queries)[:, None]


def windowed(x: Tensor, queries: int, keys: int) -> Tensor:
    q, k = torch.arange(queries)[:, None], torch.arange(keys)[None]
    return (k <= q) & (k > q - 3)


class Attention(nn.Module):
    def __init__(self, mask: Mask, more: int = 0, repeat: str = "heads") -> None:
        super().__init__()
        self.mask, self.more, self.repeat = mask, more, repeat

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.mask(q, q.shape[2], k.shape[2])
        return scaled_dot_product_attention(q, self.wide(k), self.wide(v), attn_mask=mask)

    def wide(self, x: Tensor) -> Tensor:
        batch, heads, tokens, size = x.shape
        if self.repeat == "heads":
            wide = x[:, :, None, :, :].expand(batch, heads, 2, tokens, size)
        elif self.repeat == "blocks":
            wide = x[:, None, :, :, :].expand(batch, 2, heads, tokens, size)
        else:
            return x.repeat_interleave(2, 1)
        return wide.reshape(batch, heads * 2, tokens, size)


def rewritten(module: nn.Module, keys: int = 6) -> tuple[int, Any, Tensor, Tensor]:
    """How many masks went, SDPA's node, and the results before and after."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 16, generator=generator)
    k, v = (torch.randn(2, 2, keys, 16, generator=generator) for _ in range(2))
    gm, inputs = capture(module, q, k, v)
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    before = run_graph(gm, ctx)
    count = causal(gm, ctx)
    (node,) = [n for n in gm.graph.nodes if is_call(n, SDPA)]
    after = run_graph(gm, ctx)
    first = [x[0] if isinstance(x, tuple) else x for x in (before, after)]
    return count, node, first[0], first[1]


@pytest.mark.parametrize("mask", [key_first, query_first])
def test_a_causal_mask_and_repeated_heads_go(mask: Mask) -> None:
    count, node, before, after = rewritten(Attention(mask))
    assert count == 1
    assert node.kwargs["is_causal"] and node.kwargs["enable_gqa"]
    assert node.kwargs["attn_mask"] is None
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("repeat", ["blocks", "other"])
def test_heads_repeated_otherwise_stay(repeat: str) -> None:
    count, node, before, after = rewritten(Attention(key_first, repeat=repeat))
    assert count == 1
    assert node.kwargs["is_causal"] and not node.kwargs["enable_gqa"]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [shifted, strict, swapped, cut, windowed])
def test_other_masks_stay(mask: Mask) -> None:
    count, node, before, after = rewritten(Attention(mask))
    assert count == 0
    assert node.kwargs["attn_mask"] is not None
    assert torch.equal(after, before)


def test_a_mask_over_more_keys_than_queries_stays() -> None:
    count, node, before, after = rewritten(Attention(key_first), keys=9)
    assert count == 0
    assert torch.equal(after, before)
