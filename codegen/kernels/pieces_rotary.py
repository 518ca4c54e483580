"""Jitted head norm and rotation of queries and keys (definition: ir/rotary.py).

A channel is combined with its partner: the one half the rotated width away, or its neighbour. The
partner is loaded a second time, from L1, so that one piece of code serves every form and width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qoqc.codegen.kernels.pieces import rounded

NO_ROTARY = tl.constexpr(0)
HALVES = tl.constexpr(1)  # c turns with c + R / 2
NEIGHBOURS = tl.constexpr(2)  # 2c turns with 2c + 1

FORMS = {"none": 0, "half": 1, "interleaved": 2}
"""The FORM constexpr of a rotary form's name."""


@triton.jit
def inverse_rms(squares, eps, D: tl.constexpr):
    """1 / rms from the sum of squares of D channels, as ir/glue.py computes it."""
    mean = tl.div_rn(squares, tl.full(squares.shape, D, tl.float32))
    return tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def normed(
    x,
    inverse,
    weight_ptr,
    channel,
    live,
    NORMED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """fp32 x * inverse * weight[channel], rounded to KIND where the definition does; still fp32."""
    if NORMED:
        weight = tl.load(weight_ptr + channel, mask=live, other=0.0).to(tl.float32)
        x = x * inverse
        if ROUND_FIRST:
            x = rounded(x, KIND, ROUND_BF16)
        else:
            weight = weight + OFFSET
        x = rounded(x * weight, KIND, ROUND_BF16)
    return x


@triton.jit
def turned(
    rows,
    channel,
    live,
    inverse,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    FORM: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Channels `channel` of the vectors at `rows`, normed and rotated: fp32 values of KIND.

    rows, channel, live and inverse broadcast against each other; cos_ptr and sin_ptr are those of
    the vectors' position, ROTATED values each.
    """
    x = tl.load(rows + channel, mask=live, other=0.0).to(tl.float32)
    x = normed(x, inverse, weight_ptr, channel, live, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16)
    if FORM != NO_ROTARY:
        if FORM == HALVES:
            second = channel >= ROTATED // 2
            other = tl.where(second, channel - ROTATED // 2, channel + ROTATED // 2)
        else:
            second = (channel & 1) == 1
            other = channel ^ 1
        turns = (channel < ROTATED) & live
        y = tl.load(rows + other, mask=turns, other=0.0).to(tl.float32)
        y = normed(
            y, inverse, weight_ptr, other, turns, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16
        )
        cos = tl.load(cos_ptr + channel, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + channel, mask=turns, other=0.0).to(tl.float32)
        moved = x * cos + tl.where(second, y, -y) * sin
        x = tl.where(turns, rounded(moved, KIND, ROUND_BF16), x)
    return x


@triton.jit
def turned_halves(
    rows, c, live, inverse, weight_ptr, cos_ptr, sin_ptr,
    K_HALF: tl.constexpr,
    FORM: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):  # fmt: skip
    """`turned` of channels c and c + K_HALF, c < K_HALF; where these turn together, each is loaded
    once."""
    if FORM == HALVES and ROTATED == 2 * K_HALF:
        x0 = tl.load(rows + c, mask=live, other=0.0).to(tl.float32)
        x1 = tl.load(rows + K_HALF + c, mask=live, other=0.0).to(tl.float32)
        x0 = normed(x0, inverse, weight_ptr, c, live, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16)
        x1 = normed(
            x1, inverse, weight_ptr + K_HALF, c, live, NORMED, OFFSET, ROUND_FIRST, KIND,
            ROUND_BF16,
        )  # fmt: skip
        inside = c < K_HALF
        cos0 = tl.load(cos_ptr + c, mask=inside, other=0.0).to(tl.float32)
        sin0 = tl.load(sin_ptr + c, mask=inside, other=0.0).to(tl.float32)
        cos1 = tl.load(cos_ptr + K_HALF + c, mask=inside, other=0.0).to(tl.float32)
        sin1 = tl.load(sin_ptr + K_HALF + c, mask=inside, other=0.0).to(tl.float32)
        first = rounded(x0 * cos0 - x1 * sin0, KIND, ROUND_BF16)
        second = rounded(x1 * cos1 + x0 * sin1, KIND, ROUND_BF16)
    else:
        first = turned(
            rows, c, live, inverse, weight_ptr, cos_ptr, sin_ptr, FORM, ROTATED, NORMED, OFFSET,
            ROUND_FIRST, KIND, ROUND_BF16,
        )  # fmt: skip
        second = turned(
            rows, c + K_HALF, live, inverse, weight_ptr, cos_ptr, sin_ptr, FORM, ROTATED, NORMED,
            OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
        )  # fmt: skip
    return first, second
