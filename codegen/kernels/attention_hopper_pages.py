"""The producer of attention_hopper: pages of 4-bit codes, and exact tokens, into fp16 tiles.

A tile is 64 tokens of one KV head. Keys lie [64, D] with the channels, values of pages [D, 64]
with the tokens along the lines; values of the chunk are [64, D]. Four at a time, channels and
tokens stand in the order 0, 2, 1, 3 in which a word's nibbles fall into pairs (`nibble_order`):
queries are read in it, too, and so are the tokens of keys; products do not depend on it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

# A word of 8 codes -> codes * scale + low as 4 pairs of fp16: bytes 0 and 2, bytes 1 and 3, low
# nibbles first. 0x6400 | n is 1024 + n, 0x6400 | n << 4 is 1024 + 16 n; both become n exactly, so
# only the last step rounds. A key has one scale and one low, both twice in their words.
UNPACK_KEYS = gl.constexpr("""
{
.reg .b32 t, magic, top, sixteenth, four;
mov.b32 magic, 0x64006400;
mov.b32 sixteenth, 0x2c002c00;
mov.b32 four, 0xd400d400;
shr.u32 t, $4, 8;
lop3.b32 $0, $4, 0x000f000f, magic, 0xea;
lop3.b32 $1, t, 0x000f000f, magic, 0xea;
lop3.b32 $2, $4, 0x00f000f0, magic, 0xea;
lop3.b32 $3, t, 0x00f000f0, magic, 0xea;
sub.f16x2 $0, $0, magic;
sub.f16x2 $1, $1, magic;
fma.rn.f16x2 $2, $2, sixteenth, four;
fma.rn.f16x2 $3, $3, sixteenth, four;
fma.rn.f16x2 $0, $0, $5, $6;
fma.rn.f16x2 $1, $1, $5, $6;
fma.rn.f16x2 $2, $2, $5, $6;
fma.rn.f16x2 $3, $3, $5, $6;
}
""")

# The same with a scale and a low for each code: $5 to $8 the pairs' scales, $9 to $12 their lows.
UNPACK_VALUES = gl.constexpr("""
{
.reg .b32 t, magic, sixteenth, four;
mov.b32 magic, 0x64006400;
mov.b32 sixteenth, 0x2c002c00;
mov.b32 four, 0xd400d400;
shr.u32 t, $4, 8;
lop3.b32 $0, $4, 0x000f000f, magic, 0xea;
lop3.b32 $1, t, 0x000f000f, magic, 0xea;
lop3.b32 $2, $4, 0x00f000f0, magic, 0xea;
lop3.b32 $3, t, 0x00f000f0, magic, 0xea;
sub.f16x2 $0, $0, magic;
sub.f16x2 $1, $1, magic;
fma.rn.f16x2 $2, $2, sixteenth, four;
fma.rn.f16x2 $3, $3, sixteenth, four;
fma.rn.f16x2 $0, $0, $5, $9;
fma.rn.f16x2 $1, $1, $6, $10;
fma.rn.f16x2 $2, $2, $7, $11;
fma.rn.f16x2 $3, $3, $8, $12;
}
""")

# Two words of two bf16 each -> pairs of fp16 of their first and of their second numbers
NARROW_APART = gl.constexpr("""
{
.reg .b32 a, b, c, d;
shl.b32 a, $2, 16;
shl.b32 b, $3, 16;
and.b32 c, $2, 0xffff0000;
and.b32 d, $3, 0xffff0000;
cvt.rn.satfinite.f16x2.f32 $0, b, a;
cvt.rn.satfinite.f16x2.f32 $1, d, c;
}
""")

NARROW = gl.constexpr("""
{
.reg .b32 a, b;
shl.b32 a, $1, 16;
and.b32 b, $1, 0xffff0000;
cvt.rn.satfinite.f16x2.f32 $0, b, a;
}
""")


@gluon.jit
def nibble_order(i):
    """Which channel or token stands at place `i`: of four, 1 and 2 change places."""
    return (i & -4) | ((i & 1) << 1) | ((i >> 1) & 1)


@gluon.constexpr_function
def key_layout(words):
    """Who unpacks which of [64, words] words of keys: two words, 16 channels, of a token each."""
    return gl.BlockedLayout([1, 2], [64 // words, words // 2], [4, 1], [1, 0])


@gluon.constexpr_function
def value_layout():
    """Who unpacks which of [D, 8] words of values: always the same 8 tokens for a thread."""
    return gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])


@gluon.jit
def pick(first, second, HIGH: gl.constexpr):
    """The low (or HIGH) halves of two words as one word."""
    selector: gl.constexpr = 0x7632 if HIGH else 0x5410
    return gl.inline_asm_elementwise(
        f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", [first, second], dtype=gl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def fetch_page(
    page, first, cached, k_pages_ptr, v_pages_ptr, words_ptr, DIM: gl.constexpr,
):  # fmt: skip
    """The words of a page whose first token is `first`; those of tokens past `cached` are zeros.

    Zeros, because what is left in a page may be NaN, and 0 * NaN is NaN.
    """
    KL: gl.constexpr = key_layout(DIM // 8)
    VL: gl.constexpr = value_layout()
    t = gl.arange(0, 64, layout=gl.SliceLayout(1, KL))
    w = gl.arange(0, DIM // 8, layout=gl.SliceLayout(0, KL))
    token = nibble_order(t)
    k_codes = gl.load(
        k_pages_ptr + page * (8 * DIM)
        + gl.expand_dims(token * (DIM // 8), 1) + gl.expand_dims(w, 0)
    )  # fmt: skip
    words = words_ptr + page * 128
    k_word = gl.load(words + token, mask=first + token < cached, other=0)
    d = gl.arange(0, DIM, layout=gl.SliceLayout(1, VL))
    j = gl.arange(0, 8, layout=gl.SliceLayout(0, VL))
    v_codes = gl.load(
        v_pages_ptr + page * (8 * DIM) + gl.expand_dims(d * 8, 1) + gl.expand_dims(j, 0)
    )
    words += 64 + j * 4
    left = cached - first - j * 4
    a0 = gl.load(words, mask=left > 0, other=0)
    a1 = gl.load(words + 1, mask=left > 1, other=0)
    a2 = gl.load(words + 2, mask=left > 2, other=0)
    a3 = gl.load(words + 3, mask=left > 3, other=0)
    b0 = gl.load(words + 32, mask=left > 32, other=0)
    b1 = gl.load(words + 33, mask=left > 33, other=0)
    b2 = gl.load(words + 34, mask=left > 34, other=0)
    b3 = gl.load(words + 35, mask=left > 35, other=0)
    return k_codes, k_word, v_codes, a0, a1, a2, a3, b0, b1, b2, b3


@gluon.jit
def put_page_keys(tile, codes, word, DIM: gl.constexpr):
    """Unpack words [64, D / 8] into `tile`, int32 [64, D / 2]."""
    scale = gl.expand_dims(pick(word, word, False), 1)
    low = gl.expand_dims(pick(word, word, True), 1)
    shape: gl.constexpr = [64, DIM // 8]
    e0, e1, f0, f1 = gl.inline_asm_elementwise(
        UNPACK_KEYS, "=&r,=&r,=&r,=&r,r,r,r",
        [codes, scale.broadcast_to(shape), low.broadcast_to(shape)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    half: gl.constexpr = [64, DIM // 4]
    tile.slice(0, DIM // 4, dim=1).store(gl.join(e0, e1).reshape(half))
    tile.slice(DIM // 4, DIM // 4, dim=1).store(gl.join(f0, f1).reshape(half))


@gluon.jit
def put_page_values(tile, codes, a0, a1, a2, a3, b0, b1, b2, b3, DIM: gl.constexpr):
    """Unpack words [D, 8] into `tile`, int32 [D, 32]."""
    shape: gl.constexpr = [DIM, 8]
    e0, e1, f0, f1 = gl.inline_asm_elementwise(
        UNPACK_VALUES, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [
            codes,
            gl.expand_dims(pick(a0, a2, False), 0).broadcast_to(shape),
            gl.expand_dims(pick(a1, a3, False), 0).broadcast_to(shape),
            gl.expand_dims(pick(b0, b2, False), 0).broadcast_to(shape),
            gl.expand_dims(pick(b1, b3, False), 0).broadcast_to(shape),
            gl.expand_dims(pick(a0, a2, True), 0).broadcast_to(shape),
            gl.expand_dims(pick(a1, a3, True), 0).broadcast_to(shape),
            gl.expand_dims(pick(b0, b2, True), 0).broadcast_to(shape),
            gl.expand_dims(pick(b1, b3, True), 0).broadcast_to(shape),
        ],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    half: gl.constexpr = [DIM, 16]
    tile.slice(0, 16, dim=1).store(gl.join(e0, e1).reshape(half))
    tile.slice(16, 16, dim=1).store(gl.join(f0, f1).reshape(half))


@gluon.jit
def put_chunk_keys(tile, k_ptr, stride_s, start, seq, DIM: gl.constexpr, HALVES: gl.constexpr):
    """Keys start..start + 63 of a chunk as fp16 into `tile`; HALVES: they are fp16 already."""
    L: gl.constexpr = gl.BlockedLayout([1, 2, 2], [256 // DIM, DIM // 8, 1], [4, 1, 1], [2, 1, 0])
    OUTER: gl.constexpr = gl.SliceLayout(2, L)
    for part in gl.static_range(2):
        row = gl.arange(0, 32, layout=gl.SliceLayout(1, OUTER))
        w = gl.arange(0, DIM // 4, layout=gl.SliceLayout(0, OUTER))
        e = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
        token = start + part * 32 + nibble_order(row)
        cells = gl.expand_dims(token.to(gl.int64) * stride_s, 1) + gl.expand_dims(w * 2, 0)
        cells = gl.expand_dims(cells, 2) + gl.expand_dims(gl.expand_dims(e, 0), 1)
        live = gl.expand_dims(gl.expand_dims(token < seq, 1), 2)
        x = gl.load(k_ptr + cells, mask=live, other=0)
        x0, x1 = gl.split(x)
        if HALVES:
            y0 = pick(x0, x1, False)
            y1 = pick(x0, x1, True)
        else:
            y0, y1 = gl.inline_asm_elementwise(
                NARROW_APART, "=r,=r,r,r", [x0, x1], dtype=(gl.int32, gl.int32), is_pure=True,
                pack=1,
            )  # fmt: skip
        tile.slice(part * 32, 32, dim=0).store(gl.join(y0, y1).reshape([32, DIM // 2]))


@gluon.jit
def put_chunk_values(tile, v_ptr, stride_s, start, seq, DIM: gl.constexpr, HALVES: gl.constexpr):
    """Values start..start + 63 of a chunk as fp16 into `tile`."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    for part in gl.static_range(2):
        row = gl.arange(0, 32, layout=gl.SliceLayout(1, L))
        w = gl.arange(0, DIM // 2, layout=gl.SliceLayout(0, L))
        token = start + part * 32 + nibble_order(row)
        cells = gl.expand_dims(token.to(gl.int64) * stride_s, 1) + gl.expand_dims(w, 0)
        x = gl.load(v_ptr + cells, mask=gl.expand_dims(token < seq, 1), other=0)
        if not HALVES:
            x = gl.inline_asm_elementwise(NARROW, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)
        tile.slice(part * 32, 32, dim=0).store(x)


@gluon.jit
def hand_over(full):
    """What all threads stored is there for the tensor cores."""
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(full, count=1)


@gluon.jit
def unpack(
    extent, cache, chunk, ring, DIM: gl.constexpr, KV_HEADS: gl.constexpr,
    HAS_CHUNK: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warpgroup: all tiles of keys and values that some row of the block sees."""
    length, cached, used, whole, tiles = extent
    k_pages_ptr, v_pages_ptr, words_ptr, table_ptr = cache
    k_buffers, v_buffers, ones, k_full, k_empty, v_full, v_empty = ring
    K32: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    h = gl.program_id(1)
    stage = 0
    phase = 1
    if used > 0:
        # a page's number is read two pages ahead and its words one, or waiting for them would
        # take as long as the products
        last = used - 1
        page = gl.load(table_ptr).to(gl.int64) * KV_HEADS + h
        after = gl.load(table_ptr + gl.minimum(1, last))
        k_codes, k_word, v_codes, a0, a1, a2, a3, b0, b1, b2, b3 = fetch_page(
            page, 0, cached, k_pages_ptr, v_pages_ptr, words_ptr, DIM
        )
        for i in range(used):
            page = after.to(gl.int64) * KV_HEADS + h
            after = gl.load(table_ptr + gl.minimum(i + 2, last))
            k_codes_, k_word_, v_codes_, a0_, a1_, a2_, a3_, b0_, b1_, b2_, b3_ = fetch_page(
                page, (i + 1) * 64, cached, k_pages_ptr, v_pages_ptr, words_ptr, DIM
            )
            mbarrier.wait(k_empty.index(stage), phase)
            tile = k_buffers.index(stage)._reinterpret(gl.int32, [64, DIM // 2], K32)
            put_page_keys(tile, k_codes, k_word, DIM)
            hand_over(k_full.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            tile = v_buffers.index(stage)._reinterpret(gl.int32, [DIM, 32], K32)
            put_page_values(tile, v_codes, a0, a1, a2, a3, b0, b1, b2, b3, DIM)
            hand_over(v_full.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
            k_codes, k_word, v_codes = k_codes_, k_word_, v_codes_
            a0, a1, a2, a3, b0, b1, b2, b3 = a0_, a1_, a2_, a3_, b0_, b1_, b2_, b3_
    if HAS_CHUNK:
        k_ptr, k_stride_s, v_ptr, v_stride_s, seq = chunk
        for i in range(tiles):
            mbarrier.wait(k_empty.index(stage), phase)
            tile = k_buffers.index(stage)._reinterpret(gl.int32, [64, DIM // 2], K32)
            put_chunk_keys(tile, k_ptr, k_stride_s, i * 64, seq, DIM, HALVES)
            hand_over(k_full.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            tile = v_buffers.index(stage)._reinterpret(gl.int32, [64, DIM // 2], K32)
            put_chunk_values(tile, v_ptr, v_stride_s, i * 64, seq, DIM, HALVES)
            hand_over(v_full.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
