"""New values into the slots of a page that a program of kv_append.py owns.

At 4 bits the byte (d, j) of a page holds tokens j and j + 32: both are taken at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qoqc.codegen.kernels.pieces_codes import codes_of, extent_of, grid_of, two_codes, widened


@triton.jit
def new_values(token, inside, seq, BLOCK_J: tl.constexpr):
    """The tokens of slots j and j + 32 from `token` on, [BLOCK_J] each, and which of them exist."""
    token0 = token + tl.arange(0, BLOCK_J)
    token1 = token0 + 32
    new0 = inside & (token0 >= 0) & (token0 < seq)
    new1 = inside & (token1 >= 0) & (token1 < seq)
    return token0, token1, new0, new1


@triton.jit
def load_values(
    v_base, v_stride_s, token, inside, seq, V_DIM: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The values [BLOCK_J, BLOCK_V] for slots j and those for j + 32; zeros where none are new."""
    token0, token1, new0, new1 = new_values(token, inside, seq, BLOCK_J)
    d = tl.arange(0, BLOCK_V)
    in_d = (d < V_DIM)[None, :]
    v_rows = v_base + d[None, :]
    rows0 = v_rows + token0[:, None].to(tl.int64) * v_stride_s
    rows1 = v_rows + token1[:, None].to(tl.int64) * v_stride_s
    x0 = tl.load(rows0, mask=new0[:, None] & in_d, other=0.0)
    x1 = tl.load(rows1, mask=new1[:, None] & in_d, other=0.0)
    return x0, x1


@triton.jit
def put_values(
    x0,
    x1,
    first,
    token,
    inside,
    whole,
    seq,
    v_page,
    words,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize what `load_values` gave, x0 and x1, into slots j and j + 32 of a page.

    first, token, inside, whole as `slots_of` gives them.
    """
    TOP: tl.constexpr = 15.0 if BITS == 4 else 255.0
    V_BYTES: tl.constexpr = 8 * BITS
    HALF: tl.constexpr = 32
    j = first + tl.arange(0, BLOCK_J)
    _, _, new0, new1 = new_values(token, inside, seq, BLOCK_J)
    d = tl.arange(0, BLOCK_V)
    in_d = (d < V_DIM)[None, :]
    live0 = new0[:, None] & in_d
    live1 = new1[:, None] & in_d
    x0 = widened(x0, PTX)
    x1 = widened(x1, PTX)
    min0, max0, broken0 = extent_of(x0, x0, in_d, PTX)
    min1, max1, broken1 = extent_of(x1, x1, in_d, PTX)
    low0, inverse0, word0 = grid_of(min0, max0, broken0, TOP)
    low1, inverse1, word1 = grid_of(min1, max1, broken1, TOP)
    target = v_page + d[None, :] * V_BYTES + j[:, None]
    if BITS == 8:
        tl.store(target, codes_of(x0, low0, inverse0, TOP).to(tl.uint8), mask=live0)
        tl.store(target + HALF, codes_of(x1, low1, inverse1, TOP).to(tl.uint8), mask=live1)
    else:
        codes = two_codes(x0, x1, low0, inverse0, low1, inverse1)
        if whole:
            # without a mask along j the bytes of a thread are stored at once: each would be a
            # write to L2 of its own
            tl.store(target, codes, mask=in_d)
        else:
            old = tl.load(target, mask=live0 != live1, other=0)
            kept = tl.where(live0, 0, 15) | tl.where(live1, 0, 240)
            mixed = (codes.to(tl.int32) & ~kept) | (old.to(tl.int32) & kept)
            tl.store(target, mixed.to(tl.uint8), mask=live0 | live1)
    tl.store(words + 2 * HALF + j, word0, mask=new0)
    tl.store(words + 3 * HALF + j, word1, mask=new1)
