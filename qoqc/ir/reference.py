"""The definition of every qoqc op in plain torch, for any device. Kernels are tested against this.

Integer results are exact. The linear goes through a real int8 GEMM on CPU, so this is also the
path a CPU machine runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from qoqc.errors import CacheFull
from qoqc.ir.spec import PAGE
from qoqc.quant.glu import apart
from qoqc.quant.kv import (
    HALF_PAGE,
    dequantize_kv,
    kv_grid,
    make_words,
    pack_k,
    split_words,
    unpack_k,
    unpack_v,
)

EXACT_K = 1024
"""Summands of int8 products that fp32 adds exactly: 1024 * 127 * 128 < 2**24."""


def integer_matmul(xq: torch.Tensor, w8: torch.Tensor) -> torch.Tensor:
    """`xq @ w8.T` of int8 [M, K] and int8 [N, K] as exact int32 [M, N]."""
    if 0 in xq.shape or 0 in w8.shape:
        return torch.zeros(xq.shape[0], w8.shape[0], dtype=torch.int32, device=xq.device)
    if xq.device.type == "cpu":
        # torch's int8 GEMM is wrong where the inner size is 1 ...
        if xq.shape[1] == 1 or not int8_gemm_is_usable():
            return chunked_matmul(xq, w8)
        # ... and for a single row with a stride below its length, which torch calls contiguous
        rows = xq.contiguous().as_strided(xq.shape, (xq.shape[1], 1))
        return torch._int_mm(rows, w8.t())
    # every product and sum stays below 2**53, so fp64 is exact on devices without an int8 GEMM
    return (xq.double() @ w8.double().t()).int()


def chunked_matmul(xq: torch.Tensor, w8: torch.Tensor) -> torch.Tensor:
    """`integer_matmul` through fp32 GEMMs short enough to be exact, for CPUs without VNNI."""
    acc = torch.zeros(xq.shape[0], w8.shape[0], dtype=torch.int32, device=xq.device)
    for first in range(0, xq.shape[1], EXACT_K):
        chunk = slice(first, first + EXACT_K)
        acc += (xq[:, chunk].float() @ w8[:, chunk].float().t()).int()
    return acc


@functools.cache
def int8_gemm_is_usable() -> bool:
    """Whether `torch._int_mm` is fast and exact on this CPU.

    Without AVX512-VNNI torch runs a scalar loop (22x slower than `chunked_matmul` at M=128,
    N=K=2048), and where ONEDNN_MAX_CPU_ISA hides VNNI from oneDNN its sums saturate at 16 bit.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    probe = torch.full((64, 128), 127, dtype=torch.int8)
    return all(
        bool((torch._int_mm(probe[:rows], probe.t()) == 127 * 127 * 128).all()) for rows in (1, 64)
    )


def int8_linear(
    xq: torch.Tensor,
    token_scale: torch.Tensor,
    w8: torch.Tensor,
    channel_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    matmul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = integer_matmul,
) -> torch.Tensor:
    """Integer GEMM and epilogue: xq int8 [..., K], w8 int8 [N, K] -> dtype [..., N].

    The epilogue is fp32, in this order: `acc * channel_scale * token_scale + bias + residual`.
    `matmul` is given where this function is traced: the op with integer_matmul behind it.
    """
    flat = xq.reshape(token_scale.numel(), xq.shape[-1])
    y = matmul(flat, w8).float()
    y.mul_(channel_scale).mul_(token_scale.reshape(-1, 1))
    if bias is not None:
        y.add_(bias.float())
    if residual is not None:
        y.add_(residual.reshape(y.shape).float())
    return y.to(dtype).view(*xq.shape[:-1], w8.shape[0])


def int8_glu(
    xq: torch.Tensor,
    token_scale: torch.Tensor,
    w8: torch.Tensor,
    channel_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    matmul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = integer_matmul,
) -> torch.Tensor:
    """silu(gate) * up of an int8_linear whose rows are gate and up in turn: dtype [..., N / 2].

    gate, up and silu(gate) are rounded to `dtype`, as between the ops of a model.
    """
    gate, up = apart(int8_linear(xq, token_scale, w8, channel_scale, bias, None, dtype, matmul))
    return torch.nn.functional.silu(gate) * up


def kv_append(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    start: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bits: int,
) -> None:
    """Quantize k [B, H, S, Dk] and v [B, H, S, Dv] into the pages at positions start[b] + 0..S-1.

    Pages as in quant/kv.py; block_table int32 [B, P] names the page of each 64 tokens of a
    sequence; start int64 [B]. Raises CacheFull beyond P * 64 tokens.
    """
    if 0 in k.shape:
        return
    seq, starts = k.shape[2], start.tolist()
    capacity = block_table.shape[1] * PAGE
    if (last := max(starts) + seq) > capacity:
        raise CacheFull(
            f"the KV cache holds {capacity} tokens, token {last} was appended; "
            "allocate it with a larger max_cache_len"
        )
    k_codes, v_codes, words = _quantize_pair(k, v, bits)
    k_bytes = pack_k(k_codes, bits)
    for b, first in enumerate(starts):
        done = 0
        while done < seq:  # in runs that stay within half a page, where a nibble of V has one place
            place = first + done
            page, slot = int(block_table[b, place // PAGE]), place % PAGE
            count = min(HALF_PAGE - slot % HALF_PAGE, seq - done)
            k_pages[page].narrow(1, slot, count).copy_(k_bytes[b].narrow(1, done, count))
            kv_words[page].narrow(2, slot, count).copy_(words[b].narrow(2, done, count))
            _store_v(v_pages[page], slot, v_codes[b].narrow(1, done, count), bits)
            done += count


def _quantize_pair(
    k: torch.Tensor, v: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of k and v [B, H, S, D] and their words [B, H, 2, S]."""
    if k.shape == v.shape:  # one pass: a token is so little work that the calls are what costs
        codes, scale, low = kv_grid(torch.stack((k, v), dim=2), bits)
        return codes[:, :, 0], codes[:, :, 1], make_words(scale, low)
    k_codes, k_scale, k_low = kv_grid(k, bits)
    v_codes, v_scale, v_low = kv_grid(v, bits)
    words = torch.stack((make_words(k_scale, k_low), make_words(v_scale, v_low)), dim=2)
    return k_codes, v_codes, words


def _store_v(v_page: torch.Tensor, slot: int, codes: torch.Tensor, bits: int) -> None:
    """Write codes uint8 [H, n, D] from token `slot` of a page on; they stay in one half of it."""
    codes = codes.transpose(1, 2)
    columns = v_page.narrow(2, slot % (8 * bits), codes.shape[2])
    if bits == 8:
        columns.copy_(codes)
    elif slot < HALF_PAGE:
        columns.bitwise_and_(0xF0).bitwise_or_(codes)
    else:
        columns.bitwise_and_(0x0F).bitwise_or_(codes << 4)


def kv_read(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 keys [B, H, P*64, Dk] and values [B, H, P*64, Dv] of the pages in block_table."""
    batch, pages = block_table.shape
    table = block_table.reshape(-1)

    def gather(stored: torch.Tensor) -> torch.Tensor:
        """[pages, H, ...] as [B, H, P, ...]: bytes are cheaper to move than floats later."""
        chosen = stored.index_select(0, table)
        return chosen.view(batch, pages, *chosen.shape[1:]).transpose(1, 2).contiguous()

    scale, low = (x.float() for x in split_words(gather(kv_words)))  # [B, H, P, 2, 64]
    k = dequantize_kv(unpack_k(gather(k_pages), bits), scale[..., 0, :], low[..., 0, :])
    v = dequantize_kv(unpack_v(gather(v_pages), bits), scale[..., 1, :], low[..., 1, :])
    return k.flatten(2, 3), v.flatten(2, 3)


def kv_dequant(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    length: torch.Tensor,
    k_chunk: torch.Tensor | None,
    v_chunk: torch.Tensor | None,
    bits: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All cached keys and values as 16-bit tensors [B, H, P*64, D]; zeros past length int64 [B].

    k_chunk, v_chunk [B, H, S, D]: exact values that replace the last S of the `length` tokens.
    """
    k, v = kv_read(k_pages, v_pages, kv_words, block_table, bits)
    if k_chunk is not None and v_chunk is not None:
        _overlay(k, v, length, k_chunk, v_chunk)
    dead = torch.arange(k.shape[2], device=k.device) >= length[:, None]
    for x in (k, v):
        x.masked_fill_(dead[:, None, :, None], 0)
    return k.to(dtype).contiguous(), v.to(dtype).contiguous()


def _overlay(
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    k_chunk: torch.Tensor,
    v_chunk: torch.Tensor,
) -> None:
    seq = k_chunk.shape[2]
    position = (length[:, None] - seq) + torch.arange(seq, device=length.device)
    for full, chunk in ((k, k_chunk), (v, v_chunk)):
        index = position[:, None, :, None].expand(chunk.shape)
        full.scatter_(2, index, chunk.float())


def kv_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    length: torch.Tensor,
    mask: torch.Tensor | None,
    k_chunk: torch.Tensor | None,
    v_chunk: torch.Tensor | None,
    scale: float,
    bits: int,
    causal: bool,
) -> torch.Tensor:
    """Attention of q [B, Hq, S, Dk] over the first length[b] cached tokens: [B, Hq, S, Dv].

    Query i stands at position length[b] - S + i. It sees position j < length[b] where the bool
    mask [B or 1, Hq or 1, S, >= length] allows it and, if `causal`, j is not after the query.
    k_chunk, v_chunk as in `kv_dequant`. fp32 softmax and sums; a query that sees nothing gives 0.
    """
    if mask is not None and (mask.dim() != 4 or mask.dtype is not torch.bool):
        raise ValueError(
            f"kv4_attention: mask must be bool [B or 1, Hq or 1, S, L], "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    batch, heads, seq = q.shape[:3]
    v_dim = v_pages.shape[2]
    lengths = length.tolist()
    longest = max(lengths, default=0)
    if longest == 0 or seq == 0:
        return q.new_zeros(batch, heads, seq, v_dim)
    used = -(-longest // PAGE)
    k, v = kv_read(k_pages, v_pages, kv_words, block_table[:, :used], bits)
    k, v = k[:, :, :longest], v[:, :, :longest]
    if k_chunk is not None and v_chunk is not None:
        _overlay(k, v, length, k_chunk, v_chunk)
    live = None
    if min(lengths) != longest:
        live = torch.arange(longest, device=q.device) < length[:, None]
        # masked scores do not hide a NaN left by an earlier owner of the page: 0 * NaN is NaN
        for x in (k, v):
            x.masked_fill_(~live[:, None, :, None], 0)
    allowed = _allowed(q, length, mask, live, causal, longest)
    out = F.scaled_dot_product_attention(
        q.float(), k, v, attn_mask=allowed, scale=scale, enable_gqa=True
    )
    if allowed is not None:
        out = torch.where(allowed.any(-1, keepdim=True), out, 0.0)
    return out.to(q.dtype).contiguous()


def _allowed(
    q: torch.Tensor,
    length: torch.Tensor,
    mask: torch.Tensor | None,
    live: torch.Tensor | None,
    causal: bool,
    longest: int,
) -> torch.Tensor | None:
    """The bool mask [B, 1 or Hq, S, longest] of all conditions, or None if everything is seen."""
    allowed = None if mask is None else mask[..., :longest]
    if live is not None:
        row = live[:, None, None]
        allowed = row if allowed is None else allowed & row
    if causal and q.shape[2] > 1:
        key = torch.arange(longest, device=q.device)
        query = length[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
        past = (key <= query[..., None])[:, None]
        allowed = past if allowed is None else allowed & past
    return allowed
