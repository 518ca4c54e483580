"""A window leaves SDPA's mask only where nothing else is in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qoqc.passes.cleanup import cleanup
from qoqc.passes.normalize import normalize
from qoqc.passes.prompt_windows import prompt_windows
from qoqc.testing import capture, context, run_graph, targets

SEQ = 9
Mask = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of positions of keys [1, 1, 1, T] and queries [1, 1, S, 1], and a padding bool [B, T]."""


class Attention(nn.Module):
    def __init__(self, mask: Mask, repeat: bool, more: int, first: int) -> None:
        super().__init__()
        self.mask, self.repeat, self.more, self.first = mask, repeat, more, first

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        queries = torch.arange(q.shape[2] + self.more)[self.more :] if self.more else None
        queries = torch.arange(q.shape[2]) + self.first if queries is None else queries
        keys = torch.arange(k.shape[2]) + 0
        mask = self.mask(keys[None, None, None, :], queries[None, None, :, None], seen)
        mask = mask.expand(len(q), -1, q.shape[2], k.shape[2])
        return scaled_dot_product_attention(
            q, self.wide(k), self.wide(v), attn_mask=mask, scale=0.2, enable_gqa=not self.repeat
        )

    def wide(self, x: Tensor) -> Tensor:
        if not self.repeat:
            return x
        batch, heads, tokens, size = x.shape
        spread = x[:, :, None, :, :].expand(batch, heads, 2, tokens, size)
        return spread.reshape(batch, heads * 2, tokens, size)


def rewritten(
    mask: Mask, *, repeat: bool = True, more: int = 0, first: int = 0, keys: int = SEQ
) -> tuple[int, Any]:
    """How many windows were found, and the graph; asserts that results stay as they were."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, SEQ, 16, generator=generator)
    k, v = (torch.randn(2, 2, keys, 16, generator=generator) for _ in range(2))
    seen = torch.ones(2, keys, dtype=torch.bool)
    seen[1, :3] = False
    gm, inputs = capture(Attention(mask, repeat, more, first), q, k, v, seen)
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    before = run_graph(gm, ctx)
    count = prompt_windows(gm, ctx)
    cleanup(gm, ctx)
    torch.testing.assert_close(run_graph(gm, ctx), before, rtol=1e-5, atol=1e-5, equal_nan=True)
    return count, gm


def near(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return (k <= q) & (k > q - 4)


def nested(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    """transformers' and_masks."""
    inner = q.new_ones((), dtype=torch.bool) & (k > q - 4).to("cpu")
    return inner & (k <= q).to("cpu")


def twice(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    """The narrower window counts."""
    return near(k, q, seen) & (k > q - 6)


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("mask", [near, nested, twice])
def test_taken(mask: Mask, repeat: bool) -> None:
    count, gm = rewritten(mask, repeat=repeat)
    assert count == 1
    (node,) = [n for n in gm.graph.nodes if "window_attention" in str(n.target)]
    q, k, v, scale, window = node.args
    assert (scale, window) == (0.2, 4)
    assert [x.meta["example_value"].shape[1] for x in (q, k, v)] == [4, 2, 2]
    left = targets(gm)
    assert not any(left[name] for name in ("le", "gt", "and_", "expand", "arange", "reshape"))


def only_past(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return k <= q


def only_near(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return k > q - 4


def around(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return (k <= q + 2) & (k > q - 4)


def padded(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return near(k, q, seen) & seen[:, None, None, :]


def either(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return near(k, q, seen) | (k < 2)


@pytest.mark.parametrize("mask", [only_past, only_near, around, padded, either])
def test_masks_that_say_more_or_less_stay(mask: Mask) -> None:
    count, gm = rewritten(mask)
    assert count == 0
    assert targets(gm)["scaled_dot_product_attention"] == 1


@pytest.mark.parametrize("other", [{"first": 1}, {"more": 2}, {"keys": SEQ + 2}])
def test_other_positions_stay(other: dict[str, int]) -> None:
    assert rewritten(near, **other)[0] == 0
