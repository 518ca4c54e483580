"""A mask loses exactly what attention over pages knows by itself; results stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qoqc.ir import ops
from qoqc.ir.spec import PAGE, KVSpec
from qoqc.passes.attention import attention
from qoqc.passes.cleanup import cleanup
from qoqc.passes.normalize import normalize
from qoqc.passes.windows import windows
from qoqc.runtime.kv_layers import KV4Layer
from qoqc.testing import capture, context, run_graph, targets

PAST, CAPACITY = 75, 2 * PAGE
Mask = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From places of keys and queries and the padding bool [B, T]."""


def filled() -> KV4Layer:
    layer = KV4Layer(CAPACITY, 4, "exact")
    layer.allocate(2, KVSpec(2, 32, 32), torch.device("cpu"))
    layer.update(*new(PAST, 1))
    return layer


def new(seq: int, seed: int) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, 2, 2, seq, 32, generator=torch.Generator().manual_seed(seed))
    return k, v


def padding() -> Tensor:
    seen = torch.ones(2, CAPACITY, dtype=torch.bool)
    seen[1, :70] = False
    return seen


def step(mask: Mask, layer: KV4Layer, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Masks as transformers makes them: before the cache is updated, from its first length."""
    queries = torch.arange(q.shape[2]) + layer.length[0].to(q.device)
    keys = torch.arange(CAPACITY) + 0
    made = mask(keys[None, None, None, :], queries[None, None, :, None], seen)
    k, v = layer.update(k, v)
    return F.scaled_dot_product_attention(
        q, k, v, made.expand(2, -1, q.shape[2], CAPACITY), enable_gqa=True
    )


def rewritten(mask: Mask, seq: int) -> tuple[int, Any, Any, Any]:
    """(rewrites, mask, causal, window) after it; asserts that results stay those of eager mode."""
    q = torch.randn(2, 4, seq, 32, generator=torch.Generator().manual_seed(3))
    expected = step(mask, filled(), q, *new(seq, 2), padding())
    layer = filled()
    gm, inputs = capture(
        lambda *args: step(mask, *args), layer, q, *new(seq, 2), padding()
    )  # fmt: skip
    layer.length.fill_(PAST)
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    assert attention(gm, ctx) == 1
    count = windows(gm, ctx)
    cleanup(gm, ctx)
    torch.testing.assert_close(run_graph(gm, ctx)[0], expected, rtol=1e-5, atol=1e-5)
    (node,) = [node for node in gm.graph.nodes if targets_of(node) == "kv4_attention"]
    if node.args[6] is None:
        left = targets(gm)
        assert not any(left[name] for name in ("le", "gt", "and_", "expand", "arange", "new_ones"))
    return count, node.args[6], node.args[11], node.args[14] if len(node.args) > 14 else 0


def targets_of(node: Any) -> str:
    return str(getattr(node.target, "_opname", ""))


def causal(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return k <= q


def near(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return (k > q - 8) & ~(k > q)


def nested(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    """transformers' and_masks of and_masks."""
    inner = q.new_ones((), dtype=torch.bool) & (k > q - 8).to("cpu")
    inner = inner & (k <= q).to("cpu")
    return q.new_ones((), dtype=torch.bool) & inner.to("cpu")


def backwards(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return torch.logical_and(q >= k, q - 8 < k)


def blockwise(k: Tensor, q: Tensor, seen: Tensor, kind: int = -1) -> Tensor:
    """transformers' or_masks: a block that sees all of itself, of which there is none."""
    groups = F.pad(torch.full([2, 3], kind), (0, CAPACITY - 3), "constant", -1)
    b = torch.arange(2)[:, None, None, None]
    group = groups[b, q]
    block = (group == groups[b, k]) & (group >= 0)
    return q.new_zeros((), dtype=torch.bool) | nested(k, q, seen).to("cpu") | block.to("cpu")


@pytest.mark.parametrize("seq", [1, 7])
@pytest.mark.parametrize(
    ("mask", "past", "width"),
    [(causal, True, 0), (nested, True, 8), (backwards, True, 8), (blockwise, True, 8)],
)
def test_taken_whole(mask: Mask, past: bool, width: int, seq: int) -> None:
    assert rewritten(mask, seq) == (1, None, past, width)


def strict(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return (k < q) & (k > q - 8)


def padded(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    b = torch.arange(2)[:, None, None, None]
    return (k <= q) & (k > q - 66) & seen[b, k]


def padded_flat(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return nested(k, q, seen) & seen[1]  # one axis: the others come with the window


@pytest.mark.parametrize("seq", [1, 7])
@pytest.mark.parametrize(
    ("mask", "past", "width"),
    [(padded, True, 66), (padded_flat, True, 8), (near, False, 8), (strict, False, 8)],
)
def test_what_else_is_asked_stays(mask: Mask, past: bool, width: int, seq: int) -> None:
    count, left, is_past, window = rewritten(mask, seq)
    assert (count, is_past, window) == (1, past, width)
    assert left is not None


def block(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return blockwise(k, q, seen, 0)


def written_block(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    far = torch.full([CAPACITY], -1)
    far[3] = 1
    return nested(k, q, seen) | (far[k] > 0)


def two_widths(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return (k > q - 8) & (k > q - 9) & (k <= q)


def either(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return ((k <= q) & (k > q - 8)) | (k == 3)


def blocks(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return (k // 8 == q // 8) & ~(k > q)


def wide(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return (k >= q - 8) & ~(k > q)


def later(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return (k > (q + 1) - 8) & ~(k > q)


def from_one(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return torch.arange(1, CAPACITY + 1) <= q


def from_a_value(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    start = seen[0, :PAST].sum()  # the cached tokens, as it happens
    return k <= torch.arange(q.shape[2])[:, None] + start


def of_given_width(k: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    return (k > q - seen.sum()) & ~(k > q)


@pytest.mark.parametrize("seq", [1, 7])
@pytest.mark.parametrize(
    "mask",
    [
        two_widths,
        block,
        written_block,
        either,
        blocks,
        wide,
        later,
        from_one,
        from_a_value,
        of_given_width,
    ],
)
def test_others_stay(mask: Mask, seq: int) -> None:
    count, left, past, window = rewritten(mask, seq)
    assert (count, past, window) == (0, False, 0)
    assert left is not None


def test_a_length_that_has_counted_already_is_another() -> None:
    def late(layer: KV4Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = layer.length[0]
        k, v = layer.update(k, v)
        queries = torch.arange(q.shape[2])[:, None] + start  # a view: counts the new tokens
        mask = torch.arange(CAPACITY) <= queries - q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, mask & (mask | True), enable_gqa=True)

    def later(layer: KV4Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = layer.length[0]
        k, v = layer.update(k, v)
        mask = torch.arange(CAPACITY) <= torch.arange(q.shape[2])[:, None] + start
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    q = torch.randn(2, 4, 3, 32)
    for attend in (late, later):
        gm, inputs = capture(attend, filled(), q, *new(3, 2))
        ctx = context(gm, inputs)
        normalize(gm, ctx)
        assert attention(gm, ctx) == 1
        assert windows(gm, ctx) == 0


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_first_prompt_counts_from_zero(hidden: int) -> None:
    """Over pages, too, where SDPA cannot do it (Gemma 2): all that there is are its own tokens."""
    seq = 21
    seen = torch.ones(2, seq, dtype=torch.bool)
    seen[1, :hidden] = False

    def prompt(layer: KV4Layer, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        queries, keys = torch.arange(seq)[None, None, :, None], torch.arange(seq)[None, None, None]
        mask = (keys > queries - 8) & (keys <= queries)
        mask = mask & seen[:, None, None, :] if hidden else mask
        k, v = layer.update(k, v)
        mask = mask.expand(2, -1, seq, seq)
        out: Tensor = ops.attention(q, k, v, mask, None, 0.2, 30.0, False)
        return out

    def empty() -> KV4Layer:
        layer = KV4Layer(CAPACITY, 4, "exact")
        layer.allocate(2, KVSpec(2, 32, 32), torch.device("cpu"))
        return layer

    q = torch.randn(2, 4, seq, 32, generator=torch.Generator().manual_seed(3))
    expected = prompt(empty(), q, *new(seq, 2), seen)
    layer = empty()
    gm, inputs = capture(prompt, layer, q, *new(seq, 2), seen)
    layer.length.zero_()
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    assert attention(gm, ctx) == 1
    assert windows(gm, ctx) == 1
    torch.testing.assert_close(run_graph(gm, ctx)[0], expected, rtol=1e-5, atol=1e-5)
    (node,) = [node for node in gm.graph.nodes if targets_of(node) == "kv4_attention"]
    assert (node.args[11], node.args[14]) == (True, 8)
    assert (node.args[6] is None) == (hidden == 0)
