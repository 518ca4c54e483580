"""The reference of the KV cache ops against loops and formulas written independently of it."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqc.errors import CacheFull
from qoqc.ir import kv_reference
from qoqc.quant.kv import empty_pages, fake_quantize_kv, make_words

SETTINGS = settings(deadline=None, max_examples=20)
both_bits = pytest.mark.parametrize("bits", [4, 8])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


@dataclasses.dataclass
class Cache:
    """Pages with room for `pages` * 64 tokens of each sequence, at shuffled places."""

    batch: int
    heads: int
    k_dim: int
    v_dim: int
    bits: int
    pages: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        total = self.batch * self.pages + 2  # two pages belong to nobody
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        self.table = order[: self.batch * self.pages].int().view(self.batch, self.pages)
        self.spare = order[self.batch * self.pages :]
        self.k, self.v, self.words = empty_pages(
            total, self.heads, self.k_dim, self.v_dim, self.bits, "cpu"
        )

    def tokens(self, count: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            randn(self.batch, self.heads, count, self.k_dim, seed=seed),
            randn(self.batch, self.heads, count, self.v_dim, seed=seed + 1),
        )

    def append(self, start: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        kv_reference.kv_append(
            self.k, self.v, self.words, self.table, torch.tensor(start), k, v, self.bits
        )

    def dequant(
        self,
        length: list[int],
        k_chunk: torch.Tensor | None = None,
        v_chunk: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_reference.kv_dequant(
            self.k, self.v, self.words, self.table, torch.tensor(length), k_chunk, v_chunk,
            self.bits, dtype,
        )  # fmt: skip

    def attention(
        self,
        q: torch.Tensor,
        length: list[int],
        mask: torch.Tensor | None = None,
        k_chunk: torch.Tensor | None = None,
        v_chunk: torch.Tensor | None = None,
        causal: bool = False,
        window: int = 0,
    ) -> torch.Tensor:
        return kv_reference.kv_attention(
            q, self.k, self.v, self.words, self.table, torch.tensor(length, dtype=torch.long), mask,
            k_chunk, v_chunk, 0.25, self.bits, causal, window=window,
        )  # fmt: skip


def integer_tokens(count: int, dim: int, top: int) -> torch.Tensor:
    """[1, 1, count, dim] whose values are their own codes: 0 and `top` in every vector."""
    x = torch.randint(0, top + 1, (1, 1, count, dim), generator=torch.Generator().manual_seed(3))
    x[..., 0], x[..., 1] = 0, top
    return x.float()


# append


@both_bits
@pytest.mark.parametrize("position", [0, 31, 32, 63, 64, 100, 191])
def test_bytes_of_one_token(bits: int, position: int) -> None:
    cache, top = Cache(1, 1, 8, 6, bits), 2**bits - 1
    k, v = integer_tokens(1, 8, top), integer_tokens(1, 6, top)
    cache.append([position], k, v - 8)
    page, slot = int(cache.table[0, position // 64]), position % 64
    k_codes, v_codes = k.flatten().int().tolist(), v.flatten().int().tolist()
    if bits == 8:
        assert cache.k[page, 0, slot].tolist() == k_codes
        assert cache.v[page, 0, :, slot].tolist() == v_codes
    else:
        assert cache.k[page, 0, slot].tolist() == [
            k_codes[j] | k_codes[j + 4] << 4 for j in range(4)
        ]
        shift = 4 if slot >= 32 else 0
        assert cache.v[page, 0, :, slot % 32].tolist() == [code << shift for code in v_codes]
    assert int(cache.words[page, 0, 0, slot]) & 0xFFFFFFFF == 0x00003C00  # scale 1, low 0
    assert int(cache.words[page, 0, 1, slot]) & 0xFFFFFFFF == 0xC8003C00  # scale 1, low -8
    # nothing else was written
    cache.k[page, 0, slot] = 0
    cache.v[page, 0, :, slot % (8 * bits)] = 0
    cache.words[page, 0, :, slot] = 0
    assert not any(bool(x.any()) for x in (cache.k, cache.v, cache.words))


def test_a_v_byte_keeps_the_token_32_apart() -> None:
    cache = Cache(1, 1, 4, 4, 4)
    first, second = integer_tokens(1, 4, 15), integer_tokens(1, 4, 15).flip(-1)
    page = int(cache.table[0, 0])
    for order in ([5, 37], [37, 5]):
        cache.append(order[:1], first, first)
        cache.append(order[1:], second, second)
        low, high = (first, second) if order[0] == 5 else (second, first)
        want = low.flatten().int() | high.flatten().int() << 4
        assert cache.v[page, 0, :, 5].tolist() == want.tolist()


@both_bits
@given(data=st.data())
@SETTINGS
def test_pieces_equal_one_append(bits: int, data: st.DataObject) -> None:
    batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150))
    start = [data.draw(st.integers(0, 192 - count)) for _ in range(batch)]
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=6))})
    whole, parts = (Cache(batch, 2, 8, 6, bits) for _ in range(2))
    k, v = whole.tokens(count)
    whole.append(start, k, v)
    for a, b in zip(cuts, cuts[1:], strict=False):
        parts.append([s + a for s in start], k[:, :, a:b], v[:, :, a:b])
    assert torch.equal(whole.k, parts.k)
    assert torch.equal(whole.v, parts.v)
    assert torch.equal(whole.words, parts.words)


@both_bits
def test_append_one_by_one_over_a_page_border(bits: int) -> None:
    whole, parts = Cache(2, 2, 8, 6, bits), Cache(2, 2, 8, 6, bits)
    k, v = whole.tokens(70)
    whole.append([60, 0], k, v)
    for t in range(70):
        parts.append([60 + t, t], k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert torch.equal(whole.k, parts.k)
    assert torch.equal(whole.v, parts.v)
    assert torch.equal(whole.words, parts.words)


@both_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_append_of_strided_16_bit_tokens(bits: int, dtype: torch.dtype) -> None:
    # what a model hands over: [B, S, H, D] seen as [B, H, S, D]
    plain, strided = Cache(2, 2, 8, 8, bits), Cache(2, 2, 8, 8, bits)
    k, v = (x.to(dtype) for x in plain.tokens(5))
    plain.append([0, 3], k.float(), v.float())
    strided.append(
        [0, 3],
        k.transpose(1, 2).contiguous().transpose(1, 2),
        v.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert torch.equal(plain.k, strided.k)
    assert torch.equal(plain.v, strided.v)
    assert torch.equal(plain.words, strided.words)


@both_bits
@given(start=st.integers(0, 150), count=st.integers(1, 40))
@SETTINGS
def test_append_leaves_every_other_byte_alone(bits: int, start: int, count: int) -> None:
    cache = Cache(2, 2, 8, 6, bits)
    k, v = cache.tokens(192)
    cache.append([0, 0], k, v)
    cache.k[cache.spare] = 0xA5
    cache.v[cache.spare] = 0xA5
    cache.words[cache.spare] = -7
    cache.k[cache.table[1].long()] = 0x5A
    before = cache.dequant([192, 192])
    snapshot = cache.k.clone(), cache.v.clone(), cache.words.clone()
    new_k, new_v = cache.tokens(count, seed=50)
    table, cache.table = cache.table, cache.table[:1]  # sequence 1 is not in this batch
    cache.append([start], new_k[:1], new_v[:1])
    cache.table = table
    others = [*cache.spare.tolist(), *table[1].tolist()]
    for now, then in zip((cache.k, cache.v, cache.words), snapshot, strict=True):
        assert torch.equal(now[others], then[others])
    for now, then, new in zip(cache.dequant([192, 192]), before, (new_k, new_v), strict=True):
        outside = torch.ones(192, dtype=torch.bool)
        outside[start : start + count] = False
        assert torch.equal(now[:, :, outside], then[:, :, outside])
        assert torch.equal(now[0, :, ~outside], fake_quantize_kv(new, bits)[0])


def test_cache_full_names_both_numbers_and_writes_nothing() -> None:
    cache = Cache(2, 1, 4, 4, 4)
    k, v = cache.tokens(5)
    with pytest.raises(CacheFull, match=r"holds 192 tokens, token 194 was appended.*max_cache_len"):
        cache.append([0, 189], k, v)
    assert not cache.k.any()
    assert not cache.words.any()
    cache.append([0, 187], k, v)


@pytest.mark.parametrize(("batch", "count"), [(0, 3), (2, 0), (0, 0)])
def test_append_of_nothing(batch: int, count: int) -> None:
    cache = Cache(batch, 2, 4, 4, 4)
    cache.append([192] * batch, *cache.tokens(count))
    assert not cache.k.any()


# dequant


@both_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequant_gives_the_round_trip_and_zeros_past_length(bits: int, dtype: torch.dtype) -> None:
    cache = Cache(3, 2, 8, 6, bits)
    k, v = cache.tokens(150)
    cache.append([0, 0, 0], k, v)
    for got, sent in zip(cache.dequant([150, 0, 65], dtype=dtype), (k, v), strict=True):
        want = torch.zeros(3, 2, 192, sent.shape[-1])
        rounded = fake_quantize_kv(sent, bits)
        want[0, :, :150], want[2, :, :65] = rounded[0], rounded[2, :, :65]
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert torch.equal(got, want.to(dtype))


def test_dequant_overlays_the_chunk_on_the_last_tokens() -> None:
    cache = Cache(2, 2, 8, 6, 4)
    k, v = cache.tokens(100)
    cache.append([0, 0], k, v)
    chunk = cache.tokens(7, seed=90)
    plain = cache.dequant([100, 64])
    for got, base, exact in zip(cache.dequant([100, 64], *chunk), plain, chunk, strict=True):
        want = base.clone()
        want[0, :, 93:100], want[1, :, 57:64] = exact[0], exact[1]
        assert torch.equal(got, want)


@both_bits
def test_a_nan_token_is_nan_where_it_lives_and_nowhere_else(bits: int) -> None:
    cache = Cache(1, 2, 8, 6, bits)
    k, v = cache.tokens(10)
    k[0, 1, 4, 3] = float("nan")
    cache.append([0], k, v)
    got_k, got_v = cache.dequant([10])
    assert bool(got_k[0, 1, 4].isnan().all())
    assert int(got_k.isnan().sum()) == 8
    assert not got_v.isnan().any()
    assert not cache.dequant([4])[0].isnan().any()  # past the length it is zero


@pytest.mark.parametrize(("batch", "pages"), [(0, 3), (2, 0), (0, 0)])
def test_dequant_of_nothing(batch: int, pages: int) -> None:
    cache = Cache(batch, 2, 4, 6, 4, pages=pages)
    k, v = cache.dequant([0] * batch)
    assert k.shape == (batch, 2, pages * 64, 4)
    assert v.shape == (batch, 2, pages * 64, 6)


# attention


def loop_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: list[int],
    mask: torch.Tensor | None,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """fp64, one query at a time; k, v [B, H, T, D] are the values the cache should give."""
    batch, heads, seq, _ = q.shape
    out = torch.zeros(batch, heads, seq, v.shape[-1], dtype=torch.float64)
    share = heads // k.shape[1]
    for b in range(batch):
        for h in range(heads):
            for i in range(seq):
                seen = [
                    j
                    for j in range(length[b])
                    if (not causal or j <= length[b] - seq + i)
                    and (not window or j > length[b] - seq + i - window)
                    and (mask is None or bool(mask.expand(batch, heads, seq, -1)[b, h, i, j]))
                ]
                if seen:
                    score = k[b, h // share, seen].double() @ q[b, h, i].double() * 0.25
                    out[b, h, i] = score.softmax(0) @ v[b, h // share, seen].double()
    return out


@both_bits
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("seq", [1, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("masked", ["none", "all heads", "per head"])
@pytest.mark.parametrize("chunked", [False, True])
def test_attention_equals_a_loop(
    bits: int,
    heads: int,
    kv_heads: int,
    seq: int,
    causal: bool,
    masked: str,
    chunked: bool,
    window: int,
) -> None:
    cache = Cache(3, kv_heads, 8, 6, bits)
    k, v = cache.tokens(70)
    cache.append([0, 0, 0], k, v)
    length = [70, 5, 66] if chunked else [70, 0, 65]
    k, v = fake_quantize_kv(k, bits), fake_quantize_kv(v, bits)
    k_chunk, v_chunk = cache.tokens(seq, seed=30) if chunked else (None, None)
    if k_chunk is not None and v_chunk is not None:
        for b, n in enumerate(length):
            k[b, :, n - seq : n], v[b, :, n - seq : n] = k_chunk[b], v_chunk[b]
    mask = None
    if masked != "none":
        shape = (3, heads, seq, 128) if masked == "per head" else (1, 1, seq, 70)
        mask = randn(*shape, seed=5) > 0
        mask[..., 0, :] = False  # the first query sees nothing
    q = randn(3, heads, seq, 8, seed=9)
    got = cache.attention(q, length, mask, k_chunk, v_chunk, causal, window)
    want = loop_attention(q, k, v, length, mask, causal, window)
    assert got.shape == (3, heads, seq, 6)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)
    assert not got[want == 0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_16_bit_queries_is_the_rounded_fp32_result(dtype: torch.dtype) -> None:
    cache = Cache(2, 2, 64, 64, 4)
    cache.append([0, 0], *cache.tokens(130))
    q = randn(2, 4, 1, 64).to(dtype)
    got = cache.attention(q, [130, 64])
    assert got.dtype == dtype
    assert torch.equal(got, cache.attention(q.float(), [130, 64]).to(dtype))


@both_bits
def test_attention_never_reads_past_a_length(bits: int) -> None:
    # pages are handed out again without being cleared: NaN may stand where nothing lives
    cache, clean = Cache(2, 2, 8, 6, bits), Cache(2, 2, 8, 6, bits)
    k, v = cache.tokens(100)
    cache.append([0, 0], k, v)
    cache.append([80, 40], *(torch.full_like(x, float("nan"))[:, :, :60] for x in (k, v)))
    cache.append([80, 40], k[:, :, 80:81], v[:, :, 80:81])
    clean.append([0, 0], k[:, :, :81], v[:, :, :81])
    clean.append([80, 40], k[:, :, 80:81], v[:, :, 80:81])
    q = randn(2, 4, 1, 8)
    got = cache.attention(q, [81, 41])
    assert not got.isnan().any()
    assert torch.equal(got, clean.attention(q, [81, 41]))
    near = clean.attention(q, [81, 41], window=5)
    cache.append([0, 0], *(torch.full_like(x, float("nan"))[:, :, :36] for x in (k, v)))
    assert torch.equal(cache.attention(q, [81, 41], window=5), near)


@both_bits
def test_attention_does_not_depend_on_where_pages_lie(bits: int) -> None:
    outputs = []
    for seed in range(3):
        cache = Cache(2, 2, 8, 6, bits, seed=seed)
        cache.append([0, 0], *cache.tokens(150))
        outputs.append(cache.attention(randn(2, 4, 3, 8), [150, 90], causal=True))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(("batch", "seq", "length"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_attention_of_nothing_is_zero(batch: int, seq: int, length: int) -> None:
    cache = Cache(batch, 2, 8, 6, 4)
    out = cache.attention(randn(batch, 4, seq, 8), [length] * batch, causal=True)
    assert out.shape == (batch, 4, seq, 6)
    assert not out.any()


def test_attention_with_equal_keys_is_the_mean_of_the_values() -> None:
    cache = Cache(1, 1, 8, 6, 8)
    k, v = torch.ones(1, 1, 100, 8), randn(1, 1, 100, 6)
    cache.append([0], k, v)
    got = cache.attention(randn(1, 2, 1, 8), [100])
    want = fake_quantize_kv(v, 8).double().mean(2, keepdim=True).expand(1, 2, 1, 6)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [torch.ones(3, 64, dtype=torch.bool), torch.zeros(1, 1, 3, 64)])
def test_attention_takes_only_bool_masks_with_all_four_axes(mask: torch.Tensor) -> None:
    cache = Cache(1, 1, 8, 6, 4)
    cache.append([0], randn(1, 1, 3, 8), randn(1, 1, 3, 6))
    with pytest.raises(ValueError, match=re.escape(f"{mask.dtype} {tuple(mask.shape)}")):
        cache.attention(randn(1, 1, 3, 8), [3], mask=mask)


def test_words_of_a_cache_are_the_grid_of_its_tokens() -> None:
    cache = Cache(1, 1, 8, 6, 4)
    x = torch.linspace(-1, 1, 8).view(1, 1, 1, 8)
    cache.append([3], x, x[..., :6])
    scale = torch.tensor([math.fsum([1, 1]) / 15]).half()
    want = make_words(scale, torch.tensor([-1.0]).half())
    assert int(cache.words[int(cache.table[0, 0]), 0, 0, 3]) == int(want)
