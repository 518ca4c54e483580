"""The definition of the ops on the KV cache in plain torch, for any device.

Kernels are held against these; they are also what a CPU machine runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qoqc.errors import CacheFull
from qoqc.ir.rotary import prepare
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
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    window: int = 0,
) -> torch.Tensor:
    """Attention of q [B, Hq, S, Dk] over the first length[b] cached tokens: [B, Hq, S, Dv].

    Query i stands at position length[b] - S + i. It sees position j < length[b] where the bool
    mask [B or 1, Hq or 1, S, >= length] allows it, if `causal` j is not after the query, and if
    `window` is not 0 j is after the query's position less `window` (transformers' sliding window).
    k_chunk, v_chunk as in `kv_dequant`. fp32 softmax and sums; a query that sees nothing gives 0.
    softcap, sinks as in `_scored`.
    """
    if window < 0:
        raise ValueError(f"kv4_attention: window={window}: expected a number of keys, or 0 for all")
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
    if min(lengths) != longest or window:
        key = torch.arange(longest, device=q.device)
        live = key < length[:, None]
        if window:
            live &= key > length[:, None] - seq - window
        # masked scores do not hide a NaN left by an earlier owner of the page: 0 * NaN is NaN
        for x in (k, v):
            x.masked_fill_(~live[:, None, :, None], 0)
    allowed = _allowed(q, length, mask, live, causal, longest, window)
    if softcap or sinks is not None:
        return _scored(q, k, v, allowed, scale, softcap, sinks)
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
    window: int,
) -> torch.Tensor | None:
    """The bool mask [B, 1 or Hq, S, longest] of all conditions, or None if everything is seen."""
    allowed = None if mask is None else mask[..., :longest]
    if live is not None:
        row = live[:, None, None]
        allowed = row if allowed is None else allowed & row
    key = torch.arange(longest, device=q.device)
    query = length[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    if causal and q.shape[2] > 1:
        past = (key <= query[..., None])[:, None]
        allowed = past if allowed is None else allowed & past
    if window:
        near = (key > query[..., None] - window)[:, None]
        allowed = near if allowed is None else allowed & near
    return allowed


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
) -> torch.Tensor:
    """Attention of q [B, Hq, S, Dk] over k [B, H, L, Dk] and v [B, H, L, Dv]: [B, Hq, S, Dv].

    mask    bool, or numbers to add to the scores, [B or 1, Hq or 1, S, >= L]
    causal  query i sees the keys up to i, as in SDPA: the first chunk in a cache of any length

    softcap, sinks as in `_scored`; a query that sees nothing gives 0.
    """
    length, seq = k.shape[2], q.shape[2]
    allowed = None if mask is None else mask[..., :length]
    if causal:
        query = torch.arange(seq, device=q.device)
        past = torch.arange(length, device=q.device) <= query[:, None]
        if allowed is not None and allowed.dtype is not torch.bool:
            allowed = allowed.masked_fill(~past, -torch.inf)
        else:
            allowed = past if allowed is None else allowed & past
    return _scored(q, k.float(), v.float(), allowed, scale, softcap, sinks)


def _scored(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor | None,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with what SDPA does not have, in fp32: [B, Hq, S, Dv] in q's dtype.

    allowed  bool, or numbers to add to the scores
    softcap  scores become softcap * tanh(score / softcap) (Gemma 2); 0 leaves them
    sinks    [Hq], a score per head that takes weight and gives no value (gpt-oss); None: no such
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.float() @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed is not None and allowed.dtype is torch.bool:
        scores = scores.masked_fill(~allowed, -torch.inf)
    elif allowed is not None:
        scores = scores + allowed
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    out = weights.nan_to_num(0.0) if allowed is not None and sinks is None else weights
    return (out @ v).to(q.dtype).contiguous()


def kv_rotate_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    start: torch.Tensor,
    form: str,
    eps: float,
    offset: float,
    round_first: bool,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Hq, S, Dk] and k [B, H, S, Dk] through `rotary.prepare`; k and v into the pages.

    As `kv_append` from position start[b] on. Returns q and k as attention reads them.
    """
    q = prepare(q, q_weight, cos, sin, form, eps, offset, round_first)
    k = prepare(k, k_weight, cos, sin, form, eps, offset, round_first)
    kv_append(k_pages, v_pages, kv_words, block_table, start, k, v, bits)
    # clones: what nothing was done to is the caller's own tensor
    whole = torch.contiguous_format
    return q.clone(memory_format=whole), k.clone(memory_format=whole)


def kv_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    length: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    form: str,
    eps: float,
    offset: float,
    round_first: bool,
    scale: float,
    softcap: float,
    bits: int,
    window: int = 0,
) -> torch.Tensor:
    """A decode step of one layer for q [B, Hq, 1, Dk], k [B, H, 1, Dk], v [B, H, 1, Dv].

    Appends at position length[b], counts the token in `length` int64 [B], and attends to all of
    the sequence, the new token with its quantized value: [B, Hq, 1, Dv]. mask and window as in
    `kv_attention`, softcap and sinks as in `_scored`.
    """
    if q.shape[2] != 1:
        raise ValueError(f"kv4_decode takes one new token per sequence, got q {tuple(q.shape)}")
    pages = (k_pages, v_pages, kv_words, block_table)
    grid = (form, eps, offset, round_first)
    q, _ = kv_rotate_append(q, k, v, q_weight, k_weight, cos, sin, *pages, length, *grid, bits)
    length.add_(1)
    return kv_attention(
        q, *pages, length, mask, None, None, scale, bits, False, softcap, sinks, window
    )  # fmt: skip
