"""The token of a few-token linear (few_kernel.py): its norm, and its integers as words.

Definitions: ir/glue.norm_quant and quant/activation.quantize_act, as norm_quantize.py and
quantize.py compute them; only the order of the sums over K differs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qoqc.codegen.kernels.quantize import (
    INFINITY_BITS,
    live_absmax,
    magnitude_bits,
    quantize_block,
)

DOT_PTX = gl.constexpr("dp4a.s32.s32 $0, $1, $2, 0;")


@gluon.jit
def normed(
    x, weight, bias, in_k,
    KIND: gl.constexpr, K: gl.constexpr, EPS: gl.constexpr, OFFSET: gl.constexpr,
    CENTRED: gl.constexpr, ROUND_FIRST: gl.constexpr, HAS_WEIGHT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """The norm of a token [1, BLOCK_K], fp32 values of KIND, 0 outside of `in_k`: the same."""
    if CENTRED:
        mean = gl.div_rn(gl.sum(x, axis=1), K * 1.0)
        x = gl.where(in_k, x - gl.expand_dims(mean, 1), 0.0)
    mean_square = gl.div_rn(gl.sum(x * x, axis=1), K * 1.0)
    root = gl.div_rn(1.0, gl.sqrt_rn(mean_square + EPS))
    x = x * gl.expand_dims(root, 1)
    if ROUND_FIRST:
        x = x.to(KIND).to(gl.float32)
    if HAS_WEIGHT:
        factor = weight.to(gl.float32)
        if OFFSET != 0:
            factor += OFFSET
        x = x * factor
    if HAS_BIAS:
        x += bias.to(gl.float32)
    return x.to(KIND).to(gl.float32)


@gluon.jit
def words_of(x, BLOCK_K: gl.constexpr, W: gl.constexpr):
    """A token [1, BLOCK_K] as int8: (low, high, sums, token_scale, token_sum).

    low, high   int32 [BLOCK_K / 128, 1, 4, 4] of layout W: the channels that the low and the high
                nibbles of a packed row are for (quant/pack.py), four to a word
    sums        int32 [BLOCK_K / 128, 1, 4]: of the channels of four words of both
    token_scale, token_sum  scalars
    """
    TILES: gl.constexpr = BLOCK_K // 128
    top = gl.max(magnitude_bits(x), axis=1)
    # outside of the token x is 0, or NaN where all of it is: such tokens quantize to zeros
    q = quantize_block(x, top)
    token_scale = gl.where(top < INFINITY_BITS, gl.div_rn(live_absmax(top), 127.0), float("nan"))
    bytes4 = gl.reshape(q & 255, [BLOCK_K // 4, 4])
    shift = gl.arange(0, 4, layout=gl.SliceLayout(0, bytes4.type.layout)) * 8
    # the bits do not overlap: their sum is their union
    word = gl.reshape(gl.sum(bytes4 << gl.expand_dims(shift, 0), axis=1), [TILES, 2, 4, 4])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    there = gl.allocate_shared_memory(gl.int32, [TILES, 2, 4, 4], flat, word)
    low = there.slice(0, 1, dim=1).load(W)
    high = there.slice(1, 1, dim=1).load(W)
    ones = gl.full_like(low, 0x01010101)
    sums = gl.sum(_dot(low, ones) + _dot(high, ones), axis=3)
    return low, high, sums, gl.max(token_scale, axis=0), gl.sum(gl.sum(q, axis=1), axis=0)


@gluon.jit
def _dot(a, b):
    return gl.inline_asm_elementwise(
        DOT_PTX, "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )
