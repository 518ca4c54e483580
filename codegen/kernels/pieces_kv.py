"""Jitted helpers of the KV-cache kernels: words, codes, and the online softmax over them.

A cached channel is `code * scale + low`. The kernels use the centred form
`(code - CENTRE) * scale + middle` with `middle = low + CENTRE * scale`: the codes stay small signed
integers, exact in fp16 and bf16, and the constants of a token move out of the dot products:

    q . k        = scale * (q . codes) + middle * sum(q)
    sum_t p_t v_t = sum_t (p_t * scale_t) * codes_t + sum_t p_t * middle_t
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

HEADROOM = tl.constexpr(16384.0)
"""The largest weight given to a dot product: 2**14 leaves fp16 28 octaves of full precision."""

SMALLEST_SCALE = tl.constexpr(2.0**-24)
"""The smallest positive fp16: where the running maximum of the value scales starts."""

# Four packed bytes -> four low and four high nibbles as fp16. 0x6400 | n is the fp16 1024 + n,
# 0x6408 is 1032: three instructions for two codes where an integer conversion takes four.
NIBBLES_FP16 = tl.constexpr("""
{
.reg .b32 t, u, magic, centre;
mov.b32 magic, 0x64646464;
mov.b32 centre, 0x64086408;
and.b32 t, $4, 0x0f0f0f0f;
shr.u32 u, $4, 4;
and.b32 u, u, 0x0f0f0f0f;
prmt.b32 $0, t, magic, 0x4140;
prmt.b32 $1, t, magic, 0x4342;
prmt.b32 $2, u, magic, 0x4140;
prmt.b32 $3, u, magic, 0x4342;
sub.f16x2 $0, $0, centre;
sub.f16x2 $1, $1, centre;
sub.f16x2 $2, $2, centre;
sub.f16x2 $3, $3, centre;
}
""")

# The same for bf16: 0x4300 | n is 128 + n. fma, because sub.bf16x2 needs sm_90; -136 is 0xc308.
NIBBLES_BF16 = tl.constexpr("""
{
.reg .b32 t, u, magic, one, centre;
mov.b32 magic, 0x43434343;
mov.b32 one, 0x3f803f80;
mov.b32 centre, 0xc308c308;
and.b32 t, $4, 0x0f0f0f0f;
shr.u32 u, $4, 4;
and.b32 u, u, 0x0f0f0f0f;
prmt.b32 $0, t, magic, 0x4140;
prmt.b32 $1, t, magic, 0x4342;
prmt.b32 $2, u, magic, 0x4140;
prmt.b32 $3, u, magic, 0x4342;
fma.rn.bf16x2 $0, $0, one, centre;
fma.rn.bf16x2 $1, $1, one, centre;
fma.rn.bf16x2 $2, $2, one, centre;
fma.rn.bf16x2 $3, $3, one, centre;
}
""")

# As subnormal fp16: n * 2**-24 and, where the nibble stands four bits higher, n * 2**-20. Five
# instructions for eight codes; bytes 1 and 2 of four change places. Tensor cores take subnormals.
TINY_NIBBLES = tl.constexpr("""
{
.reg .b32 odd;
shr.u32 odd, $4, 8;
and.b32 $0, $4, 0x000f000f;
and.b32 $1, odd, 0x000f000f;
and.b32 $2, $4, 0x00f000f0;
and.b32 $3, odd, 0x00f000f0;
}
""")

TINY = tl.constexpr(24)
"""Tiny codes are those of the low nibbles times 2**-TINY."""

TINY_STEP = tl.constexpr(16)
"""Tiny codes of the high nibbles are larger by this factor."""

NIBBLE_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r")


@triton.jit
def small_codes(codes, MAGIC_CENTRE: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 codes as centred DTYPE values; MAGIC_CENTRE = 1024 + the centre."""
    # 0x6400 | n is the fp16 1024 + n for n < 1024: cheaper than a conversion on every device
    bits = codes.to(tl.int16) | 0x6400
    return (bits.to(tl.float16, bitcast=True) - MAGIC_CENTRE).to(DTYPE)


@triton.jit
def unpack_codes(stored, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Packed bytes uint8 -> the low and the high nibbles, centred (code - 8), as DTYPE."""
    if PTX and tl.float16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            NIBBLES_FP16,
            NIBBLE_CONSTRAINTS,
            [stored],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    elif PTX and tl.bfloat16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            NIBBLES_BF16,
            NIBBLE_CONSTRAINTS,
            [stored],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low = small_codes(stored & 15, 1032.0, DTYPE)
        high = small_codes(stored >> 4, 1032.0, DTYPE)
    return low, high


@triton.jit
def load_codes(
    base, offsets, second, mask, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """Two tiles of centred codes: bits 4, the nibbles of the bytes at base + offsets; bits 8, the
    bytes there and at `second` bytes further."""
    if BITS == 4:
        first_codes, second_codes = unpack_codes(
            tl.load(base + offsets, mask=mask, other=0), DTYPE, PTX
        )
    else:
        first_codes = small_codes(tl.load(base + offsets, mask=mask, other=0), 1152.0, DTYPE)
        second_codes = small_codes(
            tl.load(base + second + offsets, mask=mask, other=0), 1152.0, DTYPE
        )
    return first_codes, second_codes


@triton.jit
def load_tiny(base, offsets, mask):
    """Low and high nibbles of the bytes at base + offsets as tiny fp16 codes (TINY_NIBBLES).

    Along the last axis they stand in the order of `tiny_order`.
    """
    return tl.inline_asm_elementwise(
        TINY_NIBBLES,
        NIBBLE_CONSTRAINTS,
        [tl.load(base + offsets, mask=mask, other=0)],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def tiny_order(i):
    """Which byte tiny code `i` comes from: of four, bytes 1 and 2 change places."""
    return (i & -4) | ((i & 1) << 1) | ((i >> 1) & 1)


@triton.jit
def level_of(words0, words1, level):
    """The running `level`: the least with 2**(level - 15) >= every scale in the words.

    In integers, as fp16 bits of positive numbers are in order: one instruction reduces a warp.
    """
    most = tl.max(tl.maximum(words0 & 0x7FFF, words1 & 0x7FFF), 0)
    # beyond 0x7BFF are infinity and NaN, which do not count
    return tl.maximum(level, (tl.minimum(most, 0x7BFF) + 0x3FF) >> 10)


@triton.jit
def power_of_two(exponent):
    """2.0 ** exponent for an int32 scalar of -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def octave_of(x):
    """floor(log2) of a positive fp32 scalar, as int32: no less than -95."""
    return tl.maximum(x.to(tl.int32, bitcast=True) >> 23, 32) - 127


@triton.jit
def split_word(word, CENTRE: tl.constexpr):
    """int32 words (fp16 scale | fp16 low << 16) -> fp32 scale and middle."""
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    low = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, low + CENTRE * scale


@triton.jit
def power_of_two_above(x):
    """The smallest power of two >= the positive fp32 scalar x: scaling by it rounds nothing."""
    bits = (x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def greatest_scale(top, scale0, scale1):
    """The running power of two above every value scale seen; NaN scales do not count."""
    scales = tl.maximum(
        tl.where(scale0 == scale0, scale0, 0.0), tl.where(scale1 == scale1, scale1, 0.0)
    )
    return power_of_two_above(tl.maximum(top, tl.max(scales, 0)))


@triton.jit
def rise(peak, total, s0, s1, AXIS: tl.constexpr):
    """One online-softmax step over two score tiles (log2 domain, -inf = not seen; tokens on AXIS).

    Returns the new peak and total, the factor by which older sums shrink, and the tiles' p.
    """
    new = tl.maximum(peak, tl.maximum(tl.max(s0, AXIS), tl.max(s1, AXIS)))
    # a row that has seen nothing has no peak to subtract: -inf - -inf would be NaN
    base = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(peak - base)
    p0 = tl.exp2(s0 - tl.expand_dims(base, AXIS))
    p1 = tl.exp2(s1 - tl.expand_dims(base, AXIS))
    total = total * shrink + tl.sum(p0, AXIS) + tl.sum(p1, AXIS)
    return new, total, shrink, p0, p1


@triton.jit
def weigh(p, s, factor):
    """p * factor where the score s was seen, else 0: an unseen token may hold a NaN scale."""
    return tl.where(s == float("-inf"), 0.0, p * factor)


@triton.jit
def look(
    t,
    end,
    in_row,
    position,
    mask_rows,
    mask_len,
    window,
    AXIS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Which rows (queries at `position`) see the tokens `t`, which lie on AXIS of the result."""
    token = tl.expand_dims(t, 1 - AXIS)
    rows = tl.expand_dims(in_row, AXIS)
    seen = (token >= 0) & (token < end) & rows
    if CAUSAL:
        seen = seen & (token <= tl.expand_dims(position, AXIS))
    if HAS_WINDOW:
        seen = seen & (token > tl.expand_dims(position - window, AXIS))
    if HAS_MASK:
        # loaded under a condition per row and per token, not per pair: fewer live registers
        inside = tl.expand_dims((t >= 0) & (t < end) & (t < mask_len), 1 - AXIS) & rows
        bits = tl.load(mask_rows + token, mask=inside, other=0)
        seen = seen & (bits != 0)
    return seen


@triton.jit
def mma(a, b, acc):
    """acc + a @ b; fp32 operands take three tf32 products, which keeps fp32 accuracy."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def split_weights(w, DTYPE: tl.constexpr):
    """Softmax weights as DTYPE, and in bfloat16 what that loses: 8 bits alone cost 1.6e-3."""
    high = w.to(DTYPE)
    return high, (w - high.to(tl.float32)).to(DTYPE)


@triton.jit
def capped(s, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores, drawn into -softcap .. softcap by tanh if HAS_SOFTCAP."""
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (e^2x + 1), which has its limits where e^2x has none
        s = softcap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E / softcap)) + 1.0))
    return s
