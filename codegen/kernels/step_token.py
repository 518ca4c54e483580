"""The newest token of a (sequence, KV head), piece by piece: angles, queries, key and value.

Definitions: ir/rotary.py, quant/kv.py. For TINY_CODES (pieces_kv.py) queries become fp16: a power
of two times themselves, which is the same for those of a KV head, less TINY_STEP in the second half
of channels; in each half channels stand in `tiny_order`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qoqc.codegen.kernels.pieces_codes import codes_of, extent, grid_of
from qoqc.codegen.kernels.pieces_kv import TINY, TINY_STEP, octave_of, power_of_two
from qoqc.codegen.kernels.pieces_rotary import NO_ROTARY


@triton.jit
def angles_of(
    cos, sin,
    K_HALF: tl.constexpr,
    FORM: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """cos and sin fp32 [1, BLOCK_C] of both halves of channels; 1 and 0 for those that stay."""
    c = tl.arange(0, BLOCK_C)[None, :]
    cos0, sin0, cos1, sin1 = 0.0, 0.0, 0.0, 0.0
    if FORM != NO_ROTARY:
        turns0 = (c < K_HALF) & (c < ROTATED)
        turns1 = (c < K_HALF) & (c + K_HALF < ROTATED)
        cos0 = tl.load(cos + c, mask=turns0, other=1.0).to(tl.float32)
        sin0 = tl.load(sin + c, mask=turns0, other=0.0).to(tl.float32)
        cos1 = tl.load(cos + K_HALF + c, mask=turns1, other=1.0).to(tl.float32)
        sin1 = tl.load(sin + K_HALF + c, mask=turns1, other=0.0).to(tl.float32)
    return cos0, sin0, cos1, sin1


@triton.jit
def in_tiny_order(x, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[ROWS, BLOCK_C] with its channels in `tiny_order`."""
    fours = tl.reshape(x, (ROWS, BLOCK_C // 4, 2, 2))
    return tl.reshape(tl.permute(fours, (0, 1, 3, 2)), (ROWS, BLOCK_C))


@triton.jit
def as_columns(x, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, BLOCK_C] -> [BLOCK_C, COLUMNS]: row r as the columns r, r + ROWS, ..."""
    if COLUMNS > ROWS:
        x = tl.broadcast_to(x[None, :, :], (COLUMNS // ROWS, ROWS, BLOCK_C))
        x = tl.reshape(x, (COLUMNS, BLOCK_C))
    return tl.trans(x)


@triton.jit
def as_operands(
    q0, q1,
    KIND: tl.constexpr,
    TINY_CODES: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_R: tl.constexpr,
):  # fmt: skip
    """Halves of turned queries, fp32 [GROUP_R, BLOCK_C] as `prepared` gives them, for attend_pages.

    Returns them as OPERAND [BLOCK_C, BLOCK_R] (columns from GROUP_R on repeat others), the sums of
    whole queries fp32 [BLOCK_R], and what products with codes of 1 are to be multiplied by.
    """
    q0 = q0.to(KIND).to(tl.float32)
    q1 = q1.to(KIND).to(tl.float32)
    sums = tl.sum(q0 + q1, 1)[:, None]
    unit = 1.0
    if TINY_CODES:
        # a power of two makes them fit into fp16, whatever the range of bf16
        size = tl.max(tl.max(tl.maximum(tl.abs(q0), tl.abs(q1)), 1), 0)
        octave = octave_of(size) - 14
        unit = power_of_two(octave + TINY)
        shrink = power_of_two(-octave)
        q0 = in_tiny_order((q0 * shrink).to(OPERAND), GROUP_R, BLOCK_C)
        q1 = in_tiny_order((q1 * (shrink / TINY_STEP)).to(OPERAND), GROUP_R, BLOCK_C)
    q0 = as_columns(q0.to(OPERAND), GROUP_R, BLOCK_C, BLOCK_R)
    q1 = as_columns(q1.to(OPERAND), GROUP_R, BLOCK_C, BLOCK_R)
    sums = tl.reshape(as_columns(sums, GROUP_R, 1, BLOCK_R), (BLOCK_R,))
    return q0, q1, sums, unit


@triton.jit
def value_bytes(
    v_page, slot, fits,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Where a page has the value of `slot`, and what is there: at 4 bits half is another token's.

    Apart from `put_value`, so that what comes from memory can be asked for early.
    """
    d = tl.arange(0, BLOCK_V)[None, :]
    old = 0
    if BITS == 4:
        # a byte holds the tokens of slots j and j + 32
        target = v_page + d * (8 * BITS) + slot % 32
        old = tl.load(target, mask=(d < V_DIM) & fits, other=0).to(tl.int32)
    else:
        target = v_page + d * (8 * BITS) + slot
    return target, old


@triton.jit
def put_value(
    v, old, target, words, slot, fits,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Quantize the value v, fp32 [1, BLOCK_V], to `target` (`value_bytes`) of `slot` if it fits."""
    HALF: tl.constexpr = 32
    TOP: tl.constexpr = 15.0 if BITS == 4 else 255.0
    in_d = tl.arange(0, BLOCK_V)[None, :] < V_DIM
    least, most, broken = extent(v, in_d)
    low, inverse, word = grid_of(least, most, broken, TOP)
    codes = codes_of(v, low, inverse, TOP)
    if BITS == 4:
        codes = tl.where(slot < HALF, codes | (old & 240), (codes << 4) | (old & 15))
    tl.store(target, codes.to(tl.uint8), mask=in_d & fits)
    one = tl.arange(0, 1)
    tl.store(words + 2 * HALF + slot + one, word, mask=fits & (one == 0))
