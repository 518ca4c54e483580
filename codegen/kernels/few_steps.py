"""The steps of a few-token linear (few_kernel.py): copies, dot products, sums, the result."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# $4 to $7 hold 32 weights, $8 to $11 the int8 of their low nibbles, $12 to $15 of the high ones,
# which are multiplied where they stand: 16 times too large. The sum is in $0.
DOT_NIBBLES_PTX = gl.constexpr("""
{
.reg .b32 part, low, high;
and.b32 part, $4, 0x0f0f0f0f;
dp4a.u32.s32 low, part, $8, 0;
and.b32 part, $4, 0xf0f0f0f0;
dp4a.u32.s32 high, part, $12, 0;
and.b32 part, $5, 0x0f0f0f0f;
dp4a.u32.s32 low, part, $9, low;
and.b32 part, $5, 0xf0f0f0f0;
dp4a.u32.s32 high, part, $13, high;
and.b32 part, $6, 0x0f0f0f0f;
dp4a.u32.s32 low, part, $10, low;
and.b32 part, $6, 0xf0f0f0f0;
dp4a.u32.s32 high, part, $14, high;
and.b32 part, $7, 0x0f0f0f0f;
dp4a.u32.s32 low, part, $11, low;
and.b32 part, $7, 0xf0f0f0f0;
dp4a.u32.s32 high, part, $15, high;
shr.s32 high, high, 4;
add.s32 $0, low, high;
mov.b32 $1, 0;
mov.b32 $2, 0;
mov.b32 $3, 0;
}
""")

SLOTS = gl.constexpr(8)
"""Steps after which a block adds up what its warps have: once, for most matrices."""


@gluon.constexpr_function
def weight_layout(rows, warps):
    """Of [k tiles, rows, 4, 4] words: a thread has 16 bytes, a warp whole rows, warps share K."""
    in_warp = min(rows, 8)
    return gl.BlockedLayout(
        [1, 1, 1, 4], [8 // in_warp, in_warp, 4, 1], [warps, 1, 1, 1], [3, 2, 1, 0]
    )


@gluon.constexpr_function
def word_layout(rows, warps):
    """Of [k tiles, rows] group words: 16 bytes a thread."""
    across = rows // 4
    return gl.BlockedLayout([1, 4], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def part_layout(rows, warps, ways):
    """Of [steps, ways, rows, 4] sums: a thread has eight ways of a row, and rows eight apart."""
    in_warp = min(rows, 8)
    across = max(1, ways // 8)
    return gl.BlockedLayout(
        [1, min(ways, 8), 1, 4],
        [32 // (in_warp * across), across, in_warp, 1],
        [warps, 1, 1, 1],
        [3, 2, 1, 0],
    )


@gluon.jit
def start_step(
    step, steps, w_ptr, word_ptr, w_buffer, word_buffer,
    N: gl.constexpr, K_TILES: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr,
    ROWS: gl.constexpr, W: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Start copying the weights [TILES, ROWS, 4, 4] of a step and their group words."""
    first = step * ROWS
    live = step < steps
    tile = gl.arange(0, TILES, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, W))))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, W))))
    four = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, W))))
    one = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, W))))
    tile = gl.expand_dims(gl.expand_dims(gl.expand_dims(tile, 1), 2), 3)
    row = gl.expand_dims(gl.expand_dims(gl.expand_dims(row, 0), 2), 3)
    four = gl.expand_dims(gl.expand_dims(gl.expand_dims(four, 0), 1), 3)
    one = gl.expand_dims(gl.expand_dims(gl.expand_dims(one, 0), 1), 2)
    base = w_ptr + (first // 128).to(gl.int64) * (K_TILES * 2048) + first % 128 * 16
    place = tile * 2048 + row * 16 + four * 4 + one
    # rows past the last channel are there: packed tiles are whole
    inside = (place < K_TILES * 2048) & live
    async_copy.async_copy_global_to_shared(w_buffer, base + place, mask=inside)
    if GROUPED:
        L: gl.constexpr = word_layout(ROWS, WARPS)
        tile2 = gl.expand_dims(gl.arange(0, TILES, layout=gl.SliceLayout(1, L)), 1)
        row2 = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, L)), 0)
        in_words = (tile2 < K_TILES) & (first + row2 < N) & live
        words = word_ptr + first + tile2 * N + row2
        async_copy.async_copy_global_to_shared(word_buffer, words, mask=in_words)
    async_copy.commit_group()


@gluon.jit
def products(
    weights, words, low, high, sums,
    GROUPED: gl.constexpr, ROWS: gl.constexpr, WAYS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """sum w * x of [TILES, ROWS, 4, 4] words: int32 [WAYS, ROWS, 4], a sum for each thread."""
    TILES: gl.constexpr = weights.shape[0]
    weights, low = gl.broadcast(weights, low)
    weights, high = gl.broadcast(weights, high)
    dots = gl.inline_asm_elementwise(
        DOT_NIBBLES_PTX,
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [weights, low, high],
        dtype=gl.int32,
        is_pure=True,
        pack=4,
    )
    # the first of four: the others are zeros
    even, _ = gl.split(gl.reshape(dots, [TILES, ROWS, 4, 2, 2]))
    first, _ = gl.split(even)
    acc = gl.convert_layout(first, gl.SliceLayout(3, W), assert_trivial=True)
    if GROUPED:
        words = gl.expand_dims(words, 2)
        acc = acc * (words & 255) + (((words >> 8) & 255) - 128) * sums
    return gl.sum(gl.reshape(acc, [TILES // WAYS, WAYS, ROWS, 4]), axis=0)


@gluon.jit
def channels(step, count, N: gl.constexpr, ROWS: gl.constexpr, P: gl.constexpr):
    """The channels [SLOTS, ROWS] of `count` steps from `step` on, and which there are."""
    L: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, P))
    slot = gl.expand_dims(gl.arange(0, SLOTS, layout=gl.SliceLayout(1, L)), 1)
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, L)), 0)
    channel = (step + slot * gl.num_programs(0)) * ROWS + row
    return channel, (slot < count) & (channel < N)


@gluon.jit
def finish(
    parts, step, count, token, scales, y_ptr,
    N: gl.constexpr, GROUPED: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    GLU: gl.constexpr, ROWS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Add up the parts of `count` steps and store their channels of y, as the reference does."""
    token_scale, token_sum, channel_scale, zero, bias, residual = scales
    KIND: gl.constexpr = y_ptr.dtype.element_ty
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    every = parts._reinterpret(gl.int32, parts.shape, flat).load(P)
    acc = gl.sum(gl.sum(every, axis=3), axis=1)
    channel, live = channels(step, count, N, ROWS, P)
    if not GROUPED:
        # sum (q4 - zero) * x = sum q4 * x - zero * sum x
        acc -= zero * token_sum
    y = acc.to(gl.float32) * channel_scale * token_scale
    if HAS_BIAS:
        y += bias
    if GLU:
        y = silu_product(y.to(KIND).to(gl.float32), KIND, ROWS)
        L: gl.constexpr = y.type.layout
        slot = gl.expand_dims(gl.arange(0, SLOTS, layout=gl.SliceLayout(1, L)), 1)
        row = gl.expand_dims(gl.arange(0, ROWS // 2, layout=gl.SliceLayout(0, L)), 0)
        half = (step + slot * gl.num_programs(0)) * (ROWS // 2) + row
        live_half = (slot < count) & (half < N // 2)
        gl.store(y_ptr + token * (N // 2) + half, y.to(KIND), mask=live_half)
    else:
        if HAS_RESIDUAL:
            y += residual
        gl.store(y_ptr + token * N + channel, y.to(KIND), mask=live)


@gluon.jit
def silu_product(y, KIND: gl.constexpr, ROWS: gl.constexpr):
    """silu(gate) * up of rows that are eight of gate and eight of up in turn (quant/glu.py)."""
    pairs = gl.permute(gl.reshape(y, [SLOTS, ROWS // 16, 2, 8]), [0, 1, 3, 2])
    gate, up = gl.split(pairs)
    act = (gate / (1.0 + gl.exp(-gate))).to(KIND).to(gl.float32)
    return gl.reshape(act * up, [SLOTS, ROWS // 2])
