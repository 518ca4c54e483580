"""A cache read fuses into the attention behind it, or is left right with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qoqc.ir import kv_reference, ops
from qoqc.ir.spec import KVSpec
from qoqc.passes.attention import attention
from qoqc.passes.cleanup import cleanup
from qoqc.passes.context import Context
from qoqc.passes.normalize import normalize
from qoqc.runtime.kv_layers import KV4Layer
from qoqc.testing import capture, context, run_graph, targets

HEADS, KV_HEADS, DIM, PAST = 4, 2, 32, 5


def filled(prefill_kv: Any = "exact") -> KV4Layer:
    layer = KV4Layer(64, 4, prefill_kv)
    layer.allocate(2, KVSpec(KV_HEADS, DIM, DIM), torch.device("cpu"))
    layer.update(*new(PAST, 1))
    return layer


def new(seq: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, KV_HEADS, seq, DIM, generator=generator)
    return k, v


def repeat(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, HEADS // h, s, d).reshape(b, HEADS, s, d)


def mask(seq: int) -> Tensor:
    return torch.arange(64) <= PAST + torch.arange(seq)[:, None]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rewritten(attend: Attend, seq: int = 1, **options: Any) -> tuple[Context, Any]:
    """Append, attend, rewrite; asserts that the result stays what eager mode gives."""

    def step(layer: KV4Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, *layer.update(k, v))

    q = torch.randn(2, HEADS, seq, DIM, generator=torch.Generator().manual_seed(3))
    expected = step(filled(), q, *new(seq, 2))
    # capturing runs the graph once: rewind what it appended before running the rewritten one
    layer = filled()
    gm, inputs = capture(step, layer, q, *new(seq, 2))
    layer.length.fill_(PAST)
    ctx = context(gm, inputs, **options)
    normalize(gm, ctx)
    ctx.counts["attention"] = attention(gm, ctx)
    cleanup(gm, ctx)
    torch.testing.assert_close(run_graph(gm, ctx)[0], expected, rtol=1e-5, atol=1e-5)
    assert layer.length.tolist() == [PAST + seq] * 2
    return ctx, targets(gm)


FUSED: dict[str, tuple[Attend, int]] = {
    "repeat_kv": (lambda q, k, v: sdpa(q, repeat(k), repeat(v), attn_mask=mask(1)), 1),
    "enable_gqa": (lambda q, k, v: sdpa(q, k, v, attn_mask=mask(1), enable_gqa=True), 1),
    "contiguous": (lambda q, k, v: sdpa(q, repeat(k).contiguous(), repeat(v), mask(1)), 1),
    "scale": (lambda q, k, v: sdpa(q, repeat(k), repeat(v), mask(1), scale=0.3), 1),
    "chunk": (lambda q, k, v: sdpa(q, repeat(k), repeat(v), mask(7)), 7),
    "batched mask": (
        lambda q, k, v: sdpa(q, repeat(k), repeat(v), mask(3).expand(2, 1, 3, 64)),
        3,
    ),
}
sdpa = F.scaled_dot_product_attention


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    attend, seq = FUSED[name]
    ctx, after = rewritten(attend, seq)
    assert ctx.counts["attention"] == 1
    assert ctx.refusals == []
    assert after["kv4_attention"] == after["kv4_append"] == 1
    assert after["kv4_dequant"] == after["scaled_dot_product_attention"] == 0


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(1, 64).masked_fill(~mask(1), -1e9)
    return sdpa(q, repeat(k), repeat(v), attn_mask=bias)


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys = slice(PAST - 2, PAST + 1)
    return sdpa(q, repeat(k[:, :, keys]), repeat(v[:, :, keys]))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, repeat(k), repeat(v), is_causal=True)


def narrowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, repeat(k), repeat(v[..., :16]), mask(1))


def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ repeat(k).transpose(-1, -2)).tanh().masked_fill(~mask(1), -torch.inf)
    return scores.softmax(-1) @ repeat(v)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (additive, "additive mask: runs as dequantize + SDPA"),
        (sliced, "keys or values are sliced after the cache: runs as dequantize + SDPA"),
        (causal, "is_causal over a filled cache: runs as dequantize + SDPA"),
        (narrowed, "keys or values are sliced after the cache: runs as dequantize + SDPA"),
        (own, "read outside SDPA: runs as dequantize + its own attention"),
    ],
)
def test_refused(attend: Attend, reason: str) -> None:
    ctx, after = rewritten(attend)
    assert ctx.counts["attention"] == 0
    assert reason in [refusal.reason for refusal in ctx.refusals]
    assert not any(refusal.kept for refusal in ctx.refusals)
    assert after["kv4_dequant"] == 1


def test_swapped_keys_and_values_are_not_fused() -> None:
    ctx, after = rewritten(lambda q, k, v: sdpa(q, repeat(v), repeat(k), mask(1)))
    assert ctx.counts["attention"] == 0
    assert after["kv4_dequant"] == 1


def test_permuted_tokens_are_not_fused() -> None:
    def flipped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.transpose(2, 3).reshape(x.shape) for x in (repeat(k), repeat(v)))
        return sdpa(q, k, v, mask(1))

    ctx, _ = rewritten(flipped)
    assert ctx.counts["attention"] == 0


def test_without_a_cache_nothing_changes_unless_asked() -> None:
    args = [torch.randn(1, 2, 6, 32) for _ in range(3)]
    for prefill_kv, rounds in (("exact", 0), ("quantized", 2)):
        gm, inputs = capture(lambda q, k, v: sdpa(q, k * 1, v * 1, is_causal=True), *args)
        ctx = context(gm, inputs, prefill_kv=prefill_kv)
        normalize(gm, ctx)
        assert attention(gm, ctx) == rounds // 2
        assert targets(gm)["kv4_round"] == rounds
        q, k, v = args
        if rounds:
            k, v = ops.kv4_round(k, 4), ops.kv4_round(v, 4)
        torch.testing.assert_close(run_graph(gm, ctx)[0], sdpa(q, k, v, is_causal=True))


def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = sdpa(q, k * 1, v * 1, is_causal=True)
    return sdpa(first, k * 2, v * 2, is_causal=True)


@pytest.mark.parametrize("bits", [(4, 8), (8, 4), (16, 4)])
def test_each_layer_has_bits_of_its_own(bits: tuple[int, int]) -> None:
    args = [torch.randn(1, 2, 6, 32) for _ in range(3)]
    gm, inputs = capture(two_layers, *args)
    ctx = context(gm, inputs, prefill_kv="quantized", kv_layers=bits)
    normalize(gm, ctx)
    assert attention(gm, ctx) == sum(b != 16 for b in bits)
    q, k, v = args
    for number, b in enumerate(bits):
        pair = [x * (number + 1) for x in (k, v)]
        k_seen, v_seen = (x if b == 16 else ops.kv4_round(x, b) for x in pair)
        q = sdpa(q, k_seen, v_seen, is_causal=True)
    torch.testing.assert_close(run_graph(gm, ctx)[0], q)


def test_bits_of_other_layers_than_the_graph_has_are_refused() -> None:
    gm, inputs = capture(two_layers, *(torch.randn(1, 2, 6, 32) for _ in range(3)))
    ctx = context(gm, inputs, prefill_kv="quantized", kv_layers=(4, 8, 4))
    normalize(gm, ctx)
    assert attention(gm, ctx) == 0
    assert targets(gm)["kv4_round"] == 0
    assert "kv_layers has 3 layers, this graph another number" in ctx.refusals[0].reason


def test_what_the_cache_rounded_is_not_rounded_again() -> None:
    def prefill(layer: KV4Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = layer.update(k, v)
        return sdpa(q, repeat(k), repeat(v), is_causal=True)

    layer = KV4Layer(64, 4, "quantized")
    layer.allocate(2, KVSpec(KV_HEADS, DIM, DIM), torch.device("cpu"))
    gm, inputs = capture(prefill, layer, torch.randn(2, HEADS, 6, DIM), *new(6, 2))
    ctx = context(gm, inputs, prefill_kv="quantized")
    normalize(gm, ctx)
    assert attention(gm, ctx) == 0
    assert targets(gm)["kv4_round"] == 2


@pytest.mark.parametrize("kv_bits", [4, 16])
def test_16bit_cache_is_named(kv_bits: int) -> None:
    def step(q: Tensor, k: Tensor, past: Tensor) -> Tensor:
        keys = torch.cat((past, k), dim=-2)
        return sdpa(q, keys, keys)

    gm, inputs = capture(step, *(torch.randn(1, 2, n, 32) for n in (1, 1, 5)))
    ctx = context(gm, inputs, kv_bits=kv_bits)
    normalize(gm, ctx)
    attention(gm, ctx)
    (refusal,) = ctx.refusals
    assert str(refusal).startswith("attention 0: reads a 16-bit cache")
    assert "generate through qoqc.compile or a KV4Cache" in refusal.reason
    assert refusal.kept == (kv_bits == 16)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What SDPA does not have: qoqc's attention of transformers calls it so."""
    sinks = torch.linspace(-1, 1, HEADS)
    allowed = mask(q.shape[2])[None, None] if k.shape[2] == 64 else None
    found: Tensor = ops.attention(q, k, v, allowed, sinks, 0.3, 2.0, allowed is None)
    return found


@pytest.mark.parametrize("seq", [1, 7])
def test_softcap_and_sinks_over_a_cache(seq: int) -> None:
    ctx, after = rewritten(capped, seq)
    assert ctx.counts["attention"] == after["kv4_attention"] == 1
    assert ctx.refusals == []
    assert after["attention"] == after["kv4_dequant"] == 0


@pytest.mark.parametrize("prefill_kv", ["exact", "quantized"])
def test_softcap_and_sinks_of_a_first_chunk(prefill_kv: Any) -> None:
    """Over the pages, which hold the chunk alone."""

    def prefill(layer: KV4Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return capped(q, *layer.update(k, v))

    def fresh() -> KV4Layer:
        layer = KV4Layer(64, 4, prefill_kv)
        layer.allocate(2, KVSpec(KV_HEADS, DIM, DIM), torch.device("cpu"))
        return layer

    q = torch.randn(2, HEADS, 6, DIM, generator=torch.Generator().manual_seed(3))
    expected = prefill(fresh(), q, *new(6, 2))
    layer = fresh()
    gm, inputs = capture(prefill, layer, q, *new(6, 2))
    layer.length.zero_()
    ctx = context(gm, inputs, prefill_kv=prefill_kv)
    normalize(gm, ctx)
    assert attention(gm, ctx) == 1
    cleanup(gm, ctx)
    (over,) = [node for node in gm.graph.nodes if node.target is ops.kv4_attention]
    assert (over.args[7] is None) == (prefill_kv == "quantized")
    torch.testing.assert_close(run_graph(gm, ctx)[0], expected, rtol=1e-5, atol=1e-5)


def test_softcap_and_sinks_without_a_cache_are_plain_torch() -> None:
    args = [torch.randn(1, heads, 6, 32) for heads in (HEADS, 2, 2)]
    for prefill_kv, rounds in (("exact", 0), ("quantized", 2)):
        gm, inputs = capture(lambda q, k, v: capped(q, k * 1, v * 1), *args)
        ctx = context(gm, inputs, prefill_kv=prefill_kv)
        normalize(gm, ctx)
        assert attention(gm, ctx) == rounds // 2
        assert targets(gm)["kv4_round"] == rounds
        (left,) = [node for node in gm.graph.nodes if "attention" in str(node.target)]
        assert left.target is kv_reference.attention
        q, k, v = args
        if rounds:
            k, v = ops.kv4_round(k, 4), ops.kv4_round(v, 4)
        torch.testing.assert_close(run_graph(gm, ctx)[0], capped(q, k, v))


def additive_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(1, 1, 1, 64).masked_fill(~mask(1), -1e9)
    found: Tensor = ops.attention(q, k, v, bias, None, 0.3, 2.0, False)
    return found


def test_additive_mask_of_a_soft_cap_is_refused() -> None:
    ctx, after = rewritten(additive_capped)
    assert ctx.counts["attention"] == 0
    assert "additive mask: runs as dequantize + SDPA" in [r.reason for r in ctx.refusals]
    assert after["kv4_dequant"] == after["attention"] == 1
