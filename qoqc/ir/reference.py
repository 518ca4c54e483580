"""The definition of every qoqc op in plain torch, for any device. Kernels are tested against this.

Integer results are exact. The linear goes through a real int8 GEMM on CPU, so this is also the
path a CPU machine runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qoqc.errors import CacheFull
from qoqc.ir.spec import PAGE
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


def integer_matmul(xq: torch.Tensor, w8: torch.Tensor) -> torch.Tensor:
    """`xq @ w8.T` of int8 [M, K] and int8 [N, K] as exact int32 [M, N]."""
    if 0 in xq.shape or 0 in w8.shape:
        return torch.zeros(xq.shape[0], w8.shape[0], dtype=torch.int32, device=xq.device)
    if xq.device.type == "cpu":
        return torch._int_mm(xq, w8.t())
    # every product and sum stays below 2**53, so fp64 is exact on devices without an int8 GEMM
    return (xq.double() @ w8.double().t()).int()


def int8_linear(
    xq: torch.Tensor,
    token_scale: torch.Tensor,
    w8: torch.Tensor,
    channel_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Integer GEMM and epilogue: xq int8 [..., K], w8 int8 [N, K] -> dtype [..., N].

    The epilogue is fp32, in this order: `acc * channel_scale * token_scale + bias + residual`.
    """
    flat = xq.reshape(-1, xq.shape[-1])
    y = integer_matmul(flat, w8).float()
    y.mul_(channel_scale).mul_(token_scale.reshape(-1, 1))
    if bias is not None:
        y.add_(bias.float())
    if residual is not None:
        y.add_(residual.reshape(y.shape).float())
    return y.to(dtype).view(*xq.shape[:-1], w8.shape[0])


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
    seq = k.shape[2]
    if 0 in k.shape:
        return
    capacity = block_table.shape[1] * PAGE
    last = int(start.max()) + seq
    if last > capacity:
        raise CacheFull(
            f"the KV cache holds {capacity} tokens, token {last} was appended; "
            "allocate it with a larger max_cache_len"
        )
    position = start[:, None] + torch.arange(seq, device=start.device)
    page = block_table.gather(1, position // PAGE).long()
    slot = position % PAGE
    k_codes, k_scale, k_low = kv_grid(k, bits)
    v_codes, v_scale, v_low = kv_grid(v, bits)
    # indexing [page, :, slot] puts the indexed axes first: [B, S, H, ...]
    k_pages[page, :, slot] = pack_k(k_codes, bits).transpose(1, 2)
    kv_words[page, :, 0, slot] = make_words(k_scale, k_low).transpose(1, 2)
    kv_words[page, :, 1, slot] = make_words(v_scale, v_low).transpose(1, 2)
    _store_v(v_pages, page, slot, v_codes.transpose(1, 2), bits)


def _store_v(
    v_pages: torch.Tensor, page: torch.Tensor, slot: torch.Tensor, codes: torch.Tensor, bits: int
) -> None:
    """Write codes uint8 [B, S, H, D] at page, slot [B, S]; 4-bit tokens j and j + 32 share bytes."""
    if bits == 8:
        v_pages[page, :, :, slot] = codes
        return
    for high, keep, shift in ((False, 0xF0, 0), (True, 0x0F, 4)):
        chosen = (slot >= HALF_PAGE) == high
        where = (page[chosen], slice(None), slice(None), slot[chosen] % HALF_PAGE)
        v_pages[where] = (v_pages[where] & keep) | (codes[chosen] << shift)


def kv_read(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 keys [B, H, P*64, Dk] and values [B, H, P*64, Dv] of the pages in block_table."""
    batch, pages = block_table.shape
    table = block_table.reshape(-1).long()
    scale, low = split_words(kv_words[table])
    k = dequantize_kv(unpack_k(k_pages[table], bits), scale[:, :, 0], low[:, :, 0])
    v = dequantize_kv(unpack_v(v_pages[table], bits), scale[:, :, 1], low[:, :, 1])

    def tokens(x: torch.Tensor) -> torch.Tensor:
        heads, dim = x.shape[1], x.shape[-1]
        x = x.view(batch, pages, heads, PAGE, dim).transpose(1, 2)
        return x.reshape(batch, heads, pages * PAGE, dim)

    return tokens(k), tokens(v)


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
    batch, heads, seq = q.shape[:3]
    v_dim = v_pages.shape[2]
    longest = int(length.max()) if batch else 0
    if longest == 0 or seq == 0:
        return q.new_zeros(batch, heads, seq, v_dim)
    used = -(-longest // PAGE)
    k, v = kv_read(k_pages, v_pages, kv_words, block_table[:, :used], bits)
    k, v = k[:, :, :longest], v[:, :, :longest]
    if k_chunk is not None and v_chunk is not None:
        _overlay(k, v, length, k_chunk, v_chunk)
    allowed = _allowed(q, length, mask, causal, longest)
    out = F.scaled_dot_product_attention(
        q.float(), k, v, attn_mask=allowed, scale=scale, enable_gqa=True
    )
    if allowed is not None and not bool((sees := allowed.any(-1, keepdim=True)).all()):
        out = torch.where(sees, out, 0.0)
    return out.to(q.dtype).contiguous()


def _allowed(
    q: torch.Tensor, length: torch.Tensor, mask: torch.Tensor | None, causal: bool, longest: int
) -> torch.Tensor | None:
    """The bool mask [B, 1 or Hq, S, longest] of all conditions, or None if everything is seen."""
    key = torch.arange(longest, device=q.device)
    allowed = None if mask is None else mask[..., :longest]
    if bool((length != longest).any()):
        live = (key < length[:, None])[:, None, None]
        allowed = live if allowed is None else allowed & live
    if causal and q.shape[2] > 1:
        query = length[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
        past = (key <= query[..., None])[:, None]
        allowed = past if allowed is None else allowed & past
    return allowed
