"""Jitted quantization of keys and values to the grids of quant/kv.py, and its first step, widening.

fp32 rows [T, D] -> their extent, their grid, their codes, bit for bit as the definition has them.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)
FP16_NAN = tl.constexpr(0x7E00)


@triton.jit
def half_bits(x):
    """The bits of fp32 x rounded to fp16, in an int32; one pattern for every NaN."""
    bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(x == x, bits, FP16_NAN)


@triton.jit
def extent(x, live):
    """Minimum, maximum and "holds NaN" of the rows of fp32 x [T, D], `live` channels only."""
    low = tl.min(tl.where(live, x, float("inf")), 1)
    high = tl.max(tl.where(live, x, float("-inf")), 1)
    # what is more than infinity is NaN: in integers no predicates, of which there are few
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.max(tl.where(live, magnitude, 0), 1)
    return low, high, (most > 0x7F800000).to(tl.int32)


@triton.jit
def grid_of(low, high, broken, TOP: tl.constexpr):
    """kv_grid of quant/kv.py from the extent of vectors: low, 1 / scale as fp32 [T, 1], words."""
    low = tl.minimum(tl.maximum(low, -FP16_MAX), FP16_MAX).to(tl.float16).to(tl.float32)
    high = tl.minimum(tl.maximum(high, -FP16_MAX), FP16_MAX)
    low = tl.where(broken > 0, float("nan"), low)
    scale = tl.div_rn(high - low, tl.full(high.shape, TOP, tl.float32))
    # NaN survives minimum and maximum on no device for sure
    scale = tl.where(broken > 0, float("nan"), tl.minimum(tl.maximum(scale, 0.0), FP16_MAX))
    word = half_bits(scale) | (half_bits(low) << 16)
    step = scale.to(tl.float16).to(tl.float32)
    # both sides of tl.where are computed, so the divisor must not be zero
    inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), tl.where(step > 0, step, 1.0))
    inverse = tl.where(step > 0, inverse, 0.0)
    return low[:, None], inverse[:, None], word


@triton.jit
def rounded_position(x, low, inverse, TOP: tl.constexpr):
    """int32 whose low 16 bits are `codes_of`."""
    # clamping first gives the same codes and keeps the product out of a fused multiply-add,
    # which would round once where the definition rounds twice
    inside = tl.minimum(tl.maximum((x - low) * inverse, 0.0), TOP)
    # 1.5 * 2**23 leaves no room for a fraction: the code is what its low bits hold then. A maximum
    # with NaN is the other number, or a NaN whose low bits are zeros
    return (inside + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def codes_of(x, low, inverse, TOP: tl.constexpr):
    """The codes int32 [T, D] of fp32 x on a grid; NaN gives 0."""
    return rounded_position(x, low, inverse, TOP) & 255


# Two bf16 as fp32: their bits are the upper half. As conversions, every second one takes two
WIDEN_BF16 = tl.constexpr("""
{
.reg .b32 even, odd;
shl.b32 even, $2, 16;
and.b32 odd, $2, 0xffff0000;
mov.b32 $0, even;
mov.b32 $1, odd;
}
""")


@triton.jit
def widened(x, PTX: tl.constexpr):
    """Floating-point `x` as fp32."""
    if PTX and x.dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            WIDEN_BF16, "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def nan_min(x, y):
    """The smaller of two numbers, NaN where one is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nan_max(x, y):
    """The greater of two numbers, NaN where one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def extent_of(low, high, live, PTX: tl.constexpr):
    """`extent` of the rows that lie between fp32 low and high [T, D], NaN where they hold one."""
    if PTX:
        low = tl.reduce(tl.where(live, low, float("inf")), 1, nan_min)
        high = tl.reduce(tl.where(live, high, float("-inf")), 1, nan_max)
        broken = (high != high).to(tl.int32)
    else:
        # the interpreter reduces by a function of ours one number at a time
        low, _, broken = extent(low, live)
        _, high, _ = extent(high, live)
    return low, high, broken


@triton.jit
def two_codes(first, second, low, inverse, other_low, other_inverse):
    """uint8: the 4-bit codes of fp32 `first` and, in the upper nibble, those of `second`."""
    first = rounded_position(first, low, inverse, 15.0)
    second = rounded_position(second, other_low, other_inverse, 15.0)
    # of what is above a code, nothing is in the low eight bits
    return (first + (second << 4)).to(tl.uint8)
