"""Quantize new keys and values and write them into the pages of the KV cache.

k [B, H, S, Dk], v [B, H, S, Dv] any float dtype -> k_pages, v_pages, kv_words (quant/kv.py) at
positions start[b] + 0..S-1. Twin: ir/kv_reference.py kv_append, bit for bit.

A program owns, in one page of one sequence and head, the token slots j and j + 32 for BLOCK_J
values of j. At 4 bits these share the bytes of V, so no byte has two writers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.attention import kv_spec_of, unit_stride
from qoqc.codegen.kernels.kv_selfcheck import APPEND_SELFCHECK
from qoqc.codegen.kernels.kv_values import load_values, put_values
from qoqc.codegen.kernels.pieces import check_device
from qoqc.codegen.kernels.pieces_codes import codes_of, extent, grid_of
from qoqc.ir.spec import PAGE, KVSpec
from qoqc.quant.kv import HALF_PAGE, empty_pages
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey


@triton.jit
def slots_of(start, number, seq, pages, SINGLE: tl.constexpr, BLOCK_J: tl.constexpr):
    """Which slots of which page of a sequence program `number` owns, and their tokens.

    Returns the page's place in the table, whether it has one, the first of the slots j [BLOCK_J],
    the token of the chunk that belongs into it, and whether all of j and j + 32 get new tokens.
    """
    HALF: tl.constexpr = 32
    block_page = start // (2 * HALF)
    if SINGLE:
        first = (start % HALF).to(tl.int32)
    else:
        block_page += number // (HALF // BLOCK_J)
        first = (number % (HALF // BLOCK_J)) * BLOCK_J
    # a position outside the table is dropped, never written
    inside = (start >= 0) & (block_page < pages)
    # fits 32 bits, in which comparing takes half as long
    token = (block_page * (2 * HALF) - start).to(tl.int32) + first
    whole = inside & (token >= 0) & (token + BLOCK_J + HALF <= seq)
    return block_page, inside, first, token, whole


@triton.jit
def put_keys(
    left, right, live, new, k_page, words, slot, c, K_HALF: tl.constexpr, BITS: tl.constexpr
):
    """Quantize keys, fp32 halves [BLOCK_J, BLOCK_K] of their channels, into `slot` of a page."""
    TOP: tl.constexpr = 15.0 if BITS == 4 else 255.0
    # rows that are not live are not stored: only channels need leaving out
    in_c = (c < K_HALF)[None, :]
    left_low, left_high, left_broken = extent(left, in_c)
    right_low, right_high, right_broken = extent(right, in_c)
    low, inverse, word = grid_of(
        tl.minimum(left_low, right_low),
        tl.maximum(left_high, right_high),
        left_broken | right_broken,
        TOP,
    )
    left_codes = codes_of(left, low, inverse, TOP)
    right_codes = codes_of(right, low, inverse, TOP)
    target = k_page + slot[:, None] * (2 * K_HALF * BITS // 8) + c[None, :]
    if BITS == 4:
        tl.store(target, (left_codes | (right_codes << 4)).to(tl.uint8), mask=live)
    else:
        tl.store(target, left_codes.to(tl.uint8), mask=live)
        tl.store(target + K_HALF, right_codes.to(tl.uint8), mask=live)
    tl.store(words + slot, word, mask=new)


@triton.jit(do_not_specialize=["seq", "pages", "table_stride", "start_stride"])
def kv_append(
    k_pages_ptr,
    v_pages_ptr,
    words_ptr,
    table_ptr,
    table_stride,
    start_ptr,
    start_stride,
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_ptr,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    seq,
    pages,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Append `seq` tokens; SINGLE: seq is 1, and one program covers its slot."""
    HALF: tl.constexpr = 32
    K_HALF: tl.constexpr = K_DIM // 2
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + b * start_stride)
    block_page, inside, first, token, whole = slots_of(
        start, tl.program_id(0), seq, pages, SINGLE, BLOCK_J
    )
    page = tl.load(table_ptr + b * table_stride + block_page, mask=inside, other=0).to(tl.int64)
    page_head = page * KV_HEADS + h
    k_page = k_pages_ptr + page_head * (2 * HALF * (K_DIM * BITS // 8))
    v_page = v_pages_ptr + page_head * (V_DIM * 8 * BITS)
    words = words_ptr + page_head * (4 * HALF)

    # keys: both halves of a vector, as the byte (t, c) holds channels c and c + K_DIM / 2; row r is
    # slot r % BLOCK_J of half r // BLOCK_J of the page
    c = tl.arange(0, BLOCK_K)
    r = tl.arange(0, 2 * BLOCK_J)
    row = r % BLOCK_J + r // BLOCK_J * HALF
    new = inside & (token + row >= 0) & (token + row < seq)
    live = new[:, None] & (c < K_HALF)[None, :]
    rows = k_ptr + b * k_stride_b + h * k_stride_h + c[None, :]
    rows += (token + row).to(tl.int64)[:, None] * k_stride_s
    left = tl.load(rows, mask=live, other=0.0).to(tl.float32)  # [2 * BLOCK_J, BLOCK_K]
    right = tl.load(rows + K_HALF, mask=live, other=0.0).to(tl.float32)
    put_keys(left, right, live, new, k_page, words, first + row, c, K_HALF, BITS)

    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    v0, v1 = load_values(v_base, v_stride_s, token, inside, seq, V_DIM, BLOCK_J, BLOCK_V)
    put_values(
        v0, v1, first, token, inside, whole, seq, v_page, words, V_DIM, BITS, BLOCK_J, BLOCK_V,
        False,
    )  # fmt: skip


def launch(
    kernel: Launch,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    start: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """kv4_append through `kernel`: k [B, H, S, Dk], v [B, H, S, Dv] into the pages.

    A token at a position of P * 64 or more is not written: the host does not know the positions.
    Raises ValueError for more than one token in a kernel of single ones.
    """
    batch, heads, seq = k.shape[:3]
    if 0 in (batch, heads, seq):
        return
    k, v = unit_stride(k), unit_stride(v)
    if kernel.tile["SINGLE"]:
        if seq != 1:
            raise ValueError(f"this kv_append kernel appends 1 token, got {seq}: choose by size")
        blocks = 1
    else:
        # a chunk of `seq` tokens that may start anywhere in a page touches so many pages
        blocks = ceil_div(seq + PAGE - 1, PAGE) * (HALF_PAGE // kernel.tile["BLOCK_J"])
    kernel(
        (blocks, heads, batch),
        k_pages,
        v_pages,
        kv_words,
        block_table,
        block_table.stride(0),
        start,
        start.stride(0),
        k,
        *k.stride()[:3],
        v,
        *v.stride()[:3],
        seq,
        block_table.shape[1],
    )


def spec_of(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    start: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bits: Literal[4, 8],
) -> KVSpec:
    """The spec of a call; ValueError for what the kernel does not take."""
    check_device("kv4_append", k_pages=k_pages, block_table=block_table, start=start, k=k, v=v)
    spec = kv_spec_of(k_pages, v_pages, kv_words, block_table, bits)
    batch, _, seq, _ = k.shape
    k_shape, v_shape = (
        (batch, spec.kv_heads, seq, spec.k_dim),
        (batch, spec.kv_heads, seq, spec.v_dim),
    )
    if tuple(k.shape) != k_shape or tuple(v.shape) != v_shape:
        raise ValueError(
            f"kv4_append: k {tuple(k.shape)} and v {tuple(v.shape)} do not fit the cache: "
            f"expected {k_shape} and {v_shape}"
        )
    if start.shape != (batch,) or block_table.shape[0] != batch:
        raise ValueError(
            f"kv4_append: {batch} sequences, but start is {tuple(start.shape)} and block_table "
            f"{tuple(block_table.shape)}"
        )
    return spec


def bind(spec: KVSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of the template for a cache format."""
    return {
        "KV_HEADS": spec.kv_heads,
        "K_DIM": spec.k_dim,
        "V_DIM": spec.v_dim,
        "BITS": spec.bits,
        "BLOCK_K": triton.next_power_of_2(spec.k_dim // 2),
        "BLOCK_V": triton.next_power_of_2(spec.v_dim),
        **dict(tile.constexprs),
    }


def _tile(single: int, block_j: int, num_warps: int) -> Tile:
    return Tile((("SINGLE", single), ("BLOCK_J", block_j)), num_warps=num_warps, num_stages=1)


def heuristic(spec: KVSpec, size: int, device: DeviceKey) -> Tile:
    """One slot for one token; else tiles of 2 x 8 tokens, about 16 elements per thread."""
    return _tile(1, 1, 1) if size == 1 else _tile(0, 8, 4)


def candidates(spec: KVSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Tiles worth timing for `size` new tokens per sequence."""
    if size == 1:
        return [_tile(1, 1, warps) for warps in (1, 2, 4)]
    return [_tile(0, block_j, warps) for block_j in (4, 8, 16, 32) for warps in (4, 8)]


def trial(spec: KVSpec, size: int, device: torch.device) -> Trial:
    """Append `size` random tokens to each of 16 sequences."""
    generator = torch.Generator(device).manual_seed(0)
    batch, per_sequence = 16, ceil_div(size, PAGE) + 1
    pages = empty_pages(
        batch * per_sequence, spec.kv_heads, spec.k_dim, spec.v_dim, spec.bits, device
    )
    table = torch.arange(batch * per_sequence, device=device).view(batch, -1).int()
    start = torch.arange(batch, device=device) * PAGE // batch

    def tokens(dim: int) -> torch.Tensor:
        x = torch.randn(batch, size, spec.kv_heads, dim, generator=generator, device=device)
        return x.to(torch.bfloat16).transpose(1, 2)

    k, v = tokens(spec.k_dim), tokens(spec.v_dim)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        launch(kernel, *pages, table, start, k, v)
        return pages

    return run


KV_APPEND = Family(
    "kv_append", kv_append, bind, heuristic, candidates, APPEND_SELFCHECK, trial, fp_fusion=False
)
