"""Keys and values of 4-bit pages, and exact ones behind them, as the fp16 rows of attention_hopper.

pages and chunk -> tokens fp16 [2, B, H, T, D], keys first, T a multiple of 128. A block of queries
would unpack the same pages as all blocks beside it; here that is done once, at memory speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.attention import Call, has_ptx, trial_call, unit_stride
from qoqc.codegen.kernels.kv_selfcheck import UNPACK_SELFCHECK
from qoqc.ir.spec import PAGE, AttentionSpec
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey, sm_count

TOKENS = 128
"""Tokens of a tile of attention_hopper, all of which it reads."""

PROGRAMS = 16
"""Programs per SM, more than run at once: of a long cache most pages may be empty."""

LARGEST = tl.constexpr(65504.0)


# Four bytes of codes ($4), their scales ($5, $6) and lows ($7, $8) for the low nibbles, and for the
# high ones ($9 to $12) -> codes * scale + low, of four low and four high nibbles, as pairs of fp16.
# 0x6400 | n is the fp16 1024 + n, so only the last step rounds, and stays finite.
UNPACK_NIBBLES = tl.constexpr("""
{
.reg .b32 t, u, magic, most, least;
mov.b32 magic, 0x64646464;
mov.b32 most, 0x7bff7bff;
mov.b32 least, 0xfbfffbff;
and.b32 t, $4, 0x0f0f0f0f;
shr.u32 u, $4, 4;
and.b32 u, u, 0x0f0f0f0f;
prmt.b32 $0, t, magic, 0x4140;
prmt.b32 $1, t, magic, 0x4342;
prmt.b32 $2, u, magic, 0x4140;
prmt.b32 $3, u, magic, 0x4342;
mov.b32 magic, 0x64006400;
sub.f16x2 $0, $0, magic;
sub.f16x2 $1, $1, magic;
sub.f16x2 $2, $2, magic;
sub.f16x2 $3, $3, magic;
fma.rn.f16x2 $0, $0, $5, $7;
fma.rn.f16x2 $1, $1, $6, $8;
fma.rn.f16x2 $2, $2, $9, $11;
fma.rn.f16x2 $3, $3, $10, $12;
min.NaN.f16x2 $0, $0, most;
min.NaN.f16x2 $1, $1, most;
min.NaN.f16x2 $2, $2, most;
min.NaN.f16x2 $3, $3, most;
max.NaN.f16x2 $0, $0, least;
max.NaN.f16x2 $1, $1, least;
max.NaN.f16x2 $2, $2, least;
max.NaN.f16x2 $3, $3, least;
}
""")


@triton.jit
def narrow(x):
    """fp32 as fp16, beyond its range its largest number; NaN stays NaN."""
    x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def grid_at(words_ptr):
    """Scales and lows, fp16, of the tokens whose words are at `words_ptr`.

    Without a mask, so that words are loaded 16 bytes at once: what lies behind a sequence's end is
    not stored.
    """
    word = tl.load(words_ptr)
    low = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True), low


@triton.jit
def unpack_bytes(codes, scale0, low0, scale1, low1, PTX: tl.constexpr):
    """Low nibbles * scale0 + low0 and high ones * scale1 + low1, fp16, rounded once."""
    scale0 = tl.broadcast_to(scale0, codes.shape)
    low0 = tl.broadcast_to(low0, codes.shape)
    scale1 = tl.broadcast_to(scale1, codes.shape)
    low1 = tl.broadcast_to(low1, codes.shape)
    if PTX:
        y0, y1 = tl.inline_asm_elementwise(
            UNPACK_NIBBLES, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [codes, scale0, low0, scale1, low1], dtype=(tl.float16, tl.float16), is_pure=True,
            pack=4,
        )  # fmt: skip
    else:
        y0 = narrow((codes & 15).to(tl.float32) * scale0 + low0)
        y1 = narrow((codes >> 4).to(tl.float32) * scale1 + low1)
    return y0, y1


@triton.jit(do_not_specialize=["table_stride", "length_stride", "seq", "pages", "heads", "rows"])
def attention_unpack(
    k_pages_ptr,  # [pages, H, 64, D / 2] uint8
    v_pages_ptr,  # [pages, H, D, 32] uint8
    words_ptr,  # [pages, H, 2, 64] int32
    table_ptr,  # [B, P] int32
    table_stride,
    length_ptr,  # [B] int64
    length_stride,
    k_chunk_ptr,  # [B, H, S, D], read if HAS_CHUNK
    k_chunk_stride_b,
    k_chunk_stride_h,
    k_chunk_stride_s,
    v_chunk_ptr,
    v_chunk_stride_b,
    v_chunk_stride_h,
    v_chunk_stride_s,
    tokens_ptr,  # [2, B, heads, T, D] fp16
    seq,
    pages,
    heads,  # of the H heads, those that pointers and grid begin with
    rows,  # T
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Keys (program_id(2) = 0) or values of every num_programs(0)-th page of a sequence and head.

    Up to the end of the sequence's last tile.
    """
    HALF: tl.constexpr = DIM // 2
    if PTX:
        # attention_hopper waits for the end of this kernel by itself
        gdc_launch_dependents()
    of = tl.program_id(1).to(tl.int64)
    b, h = of // heads, of % heads
    is_value = tl.program_id(2)
    length = tl.load(length_ptr + b * length_stride)
    # of a sequence longer than its table nothing is read
    length = tl.where(length > pages.to(tl.int64) * 64, 0, tl.maximum(length, 0)).to(tl.int32)
    cached = length
    if HAS_CHUNK:
        cached = tl.maximum(length - seq, 0)
    out = tokens_ptr + (of + is_value * tl.num_programs(1).to(tl.int64)) * rows * DIM
    table = table_ptr + b * table_stride
    t = tl.arange(0, 64)
    low_t = tl.arange(0, 32)
    half = tl.arange(0, HALF)
    c = tl.arange(0, DIM)
    used = (length + TILE - 1) // TILE * (TILE // 64)
    for i in range(tl.program_id(0), used, tl.num_programs(0)):
        first = i * 64
        if first < cached:
            page = tl.load(table + i).to(tl.int64) * KV_HEADS + h
            words = words_ptr + page * 128
            if is_value == 0:
                live = first + t < cached
                scale, low = grid_at(words + t)
                scale, low = scale[:, None], low[:, None]
                # 8 bytes of a thread make the 16 that it stores: no exchange between threads
                eights = tl.max_contiguous(half, 8)
                k_cells = k_pages_ptr + page * (64 * HALF) + t[:, None] * HALF + eights[None, :]
                k0, k1 = unpack_bytes(tl.load(k_cells), scale, low, scale, low, PTX)
                k_rows = out + ((first + t).to(tl.int64) * DIM)[:, None] + half[None, :]
                tl.store(k_rows, k0, mask=live[:, None])
                tl.store(k_rows + HALF, k1, mask=live[:, None])
            else:
                # a byte has the values of tokens 32 apart
                live0 = first + low_t < cached
                live1 = first + 32 + low_t < cached
                scale0, low0 = grid_at(words + 64 + low_t)
                scale1, low1 = grid_at(words + 96 + low_t)
                v_cells = v_pages_ptr + page * (32 * DIM) + c[:, None] * 32 + low_t[None, :]
                scale0, low0, scale1, low1 = scale0[None], low0[None], scale1[None], low1[None]
                v0, v1 = unpack_bytes(tl.load(v_cells), scale0, low0, scale1, low1, PTX)
                v_rows = out + ((first + low_t).to(tl.int64) * DIM)[:, None] + c[None, :]
                tl.store(v_rows, tl.trans(v0), mask=live0[:, None])
                tl.store(v_rows + 32 * DIM, tl.trans(v1), mask=live1[:, None])
        if first + 64 > cached:
            # exact tokens, behind the last one zeros
            exact = tl.zeros((64, DIM), tl.float16)
            if HAS_CHUNK:
                u = (first + t - (length - seq)).to(tl.int64)
                live = ((first + t >= cached) & (first + t < length))[:, None]
                if is_value == 0:
                    chunk = k_chunk_ptr + b * k_chunk_stride_b + h * k_chunk_stride_h
                    cells = chunk + (u * k_chunk_stride_s)[:, None] + c[None, :]
                    exact = narrow(tl.load(cells, mask=live, other=0.0).to(tl.float32))
                else:
                    chunk = v_chunk_ptr + b * v_chunk_stride_b + h * v_chunk_stride_h
                    cells = chunk + (u * v_chunk_stride_s)[:, None] + c[None, :]
                    exact = narrow(tl.load(cells, mask=live, other=0.0).to(tl.float32))
            rest = (first + t >= cached)[:, None]
            tl.store(out + ((first + t).to(tl.int64) * DIM)[:, None] + c[None, :], exact, mask=rest)


def rows_of(call: Call) -> int:
    """T: the tokens that the block table has room for, in whole tiles."""
    return ceil_div(call.block_table.shape[1] * PAGE, TOKENS) * TOKENS


def launch(kernel: Launch, call: Call, heads: int) -> torch.Tensor:
    """The first `heads` KV heads of a checked call: fp16 [2, B, heads, T, D].

    Both are as in `kv_dequant` (ir/kv_reference.py), but undefined behind the tile of 128 tokens in
    which a sequence ends.
    """
    batch, seq, dim = call.q.shape[0], call.q.shape[2], call.v_pages.shape[2]
    rows = rows_of(call)
    tokens = torch.empty(2, batch, heads, rows, dim, dtype=torch.float16, device=call.q.device)
    chunk: list[Any] = []
    for x in (call.k_chunk, call.v_chunk):
        # any tensor stands in for one that is not read
        present = call.q if x is None else unit_stride(x)
        chunk += [present, *present.stride()[:3]]
    programs = ceil_div(PROGRAMS * sm_count(call.q.device), batch * heads)
    kernel(
        (min(programs, rows // PAGE), batch * heads, 2), call.k_pages, call.v_pages, call.kv_words,
        call.block_table, call.block_table.stride(0), call.length, call.length.stride(0), *chunk,
        tokens, seq, call.block_table.shape[1], heads, rows,
    )  # fmt: skip
    return tokens


def bind(spec: AttentionSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `attention_unpack`."""
    return {
        "KV_HEADS": spec.kv.kv_heads,
        "DIM": spec.kv.k_dim,
        "HAS_CHUNK": spec.has_chunk,
        "TILE": TOKENS,
        **dict(tile.constexprs),
    }


def refuses(spec: AttentionSpec, device: DeviceKey) -> str | None:
    """Why attention_hopper, and with it this kernel, does not take a spec; None if it does."""
    if device.arch != 90:
        return f"{device.name} is not of compute capability 9.0"
    kv = spec.kv
    if kv.bits != 4 or kv.k_dim != kv.v_dim or kv.k_dim not in (64, 128):
        return f"heads of {kv.k_dim} and {kv.v_dim} channels in {kv.bits} bits"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"queries of {spec.dtype}"
    if spec.has_mask or spec.has_softcap:
        return "a mask or a soft cap"
    if spec.has_window:
        return "a window"
    return None


def heuristic(spec: AttentionSpec, size: int, device: DeviceKey) -> Tile:
    """A page has 64 keys or values for each thread of four warps, or half as many."""
    return _tile(4, device)


def candidates(spec: AttentionSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Warps."""
    return tuple(_tile(num_warps, device) for num_warps in (4, 2, 8))


def _tile(num_warps: int, device: DeviceKey) -> Tile:
    return Tile((("PTX", has_ptx(device)),), num_warps, num_stages=1)


def trial(spec: AttentionSpec, size: int, device: torch.device) -> Trial:
    """Unpack 1024 tokens, and `size` behind them."""
    call = trial_call(spec, 1, size, 1024, device)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        return (launch(kernel, call, spec.kv.kv_heads)[:, :, :, : 1024 + size],)

    return run


ATTENTION_UNPACK = Family(
    "attention_unpack",
    attention_unpack,
    bind,
    heuristic,
    candidates,
    UNPACK_SELFCHECK,
    trial,
    tolerance=1e-3,
    fp_fusion=True,
    refuses=refuses,
)
