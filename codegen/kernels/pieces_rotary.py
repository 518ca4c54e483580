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
def partner_of(
    rows, channel, live, inverse, weight_ptr,
    FORM: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):  # fmt: skip
    """What channels meet under the sine, normed; 0 for those that do not turn."""
    if FORM == HALVES:
        second = channel >= ROTATED // 2
        other = tl.where(second, channel - ROTATED // 2, channel + ROTATED // 2)
    else:
        second = (channel & 1) == 1
        other = channel ^ 1
    turns = live & (channel < ROTATED)[None, :]
    y = tl.load(rows + other[None, :], mask=turns, other=0.0).to(tl.float32)
    y = normed(
        y, inverse, weight_ptr, other[None, :], turns, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16
    )
    return tl.where(second[None, :], y, -y)


@triton.jit
def prepared(
    rows, c, live, weight_ptr, eps, cos0, sin0, cos1, sin1,
    K_HALF: tl.constexpr,
    FORM: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):  # fmt: skip
    """Channels c and c + K_HALF of the vectors at `rows` [T, 1], normed and rotated: fp32 [T, C].

    cos0, sin0, cos1, sin1  [T, C], 1 and 0 for channels that do not turn
    """
    K_DIM: tl.constexpr = 2 * K_HALF
    x0 = tl.load(rows + c[None, :], mask=live, other=0.0).to(tl.float32)
    x1 = tl.load(rows + K_HALF + c[None, :], mask=live, other=0.0).to(tl.float32)
    inverse = 0.0
    if NORMED:
        mean = tl.div_rn(tl.sum(x0 * x0, 1) + tl.sum(x1 * x1, 1), K_DIM * 1.0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
        x0 = normed(
            x0, inverse, weight_ptr, c[None, :], live, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16
        )
        x1 = normed(
            x1, inverse, weight_ptr + K_HALF, c[None, :], live, NORMED, OFFSET, ROUND_FIRST, KIND,
            ROUND_BF16,
        )  # fmt: skip
    if FORM != NO_ROTARY:
        if FORM == HALVES and ROTATED == K_DIM:
            y0 = -x1
            y1 = x0
        else:
            y0 = partner_of(
                rows, c, live, inverse, weight_ptr, FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST,
                KIND, ROUND_BF16,
            )  # fmt: skip
            y1 = partner_of(
                rows, c + K_HALF, live, inverse, weight_ptr, FORM, ROTATED, NORMED, OFFSET,
                ROUND_FIRST, KIND, ROUND_BF16,
            )  # fmt: skip
        x0 = rounded(x0 * cos0 + y0 * sin0, KIND, ROUND_BF16)
        x1 = rounded(x1 * cos1 + y1 * sin1, KIND, ROUND_BF16)
    return x0, x1
