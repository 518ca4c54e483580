"""Causal attention among the tokens of a prompt of which each sees the last few: one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

torch.library.define(
    "qoqc::window_attention",
    "(Tensor q, Tensor k, Tensor v, float scale, int window) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
window_attention = torch.ops.qoqc.window_attention.default

FLASH_HEADS = range(8, 257, 8)
"""The head sizes that torch's flash attention takes as they are."""


def windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Attention of q [B, Hq, S, Dk] over k [B, H, S, Dk] and v [B, H, S, Dv]: [B, Hq, S, Dv].

    Query i sees the keys i - window + 1 to i, as in transformers; window is at least 1. The result
    is a view of heads side by side, [B, S, Hq, Dv], which is how models go on.
    """
    if _is_for_flash(q, k, v):
        rows = (x.transpose(1, 2) for x in (q, k, v))
        length = q.shape[2]
        # what torch.nn.attention.varlen calls, for sequences of one length; SDPA has no windows
        out, *_ = torch.ops.aten._flash_attention_forward(
            *rows, None, None, length, length, 0.0, True, False,
            scale=scale, window_size_left=window - 1, window_size_right=0,
        )  # fmt: skip
        # in the order of q's memory, which may be that of heads one after the other
        heads: Tensor = out.contiguous().transpose(1, 2)
        return heads
    place = torch.arange(q.shape[2], device=q.device)
    ago = place[:, None] - place
    seen = (ago >= 0) & (ago < window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _is_for_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in FLASH_HEADS
        and all(x.stride(-1) == 1 for x in (q, k, v))
    )


torch.library.impl("qoqc::window_attention", "default")(windowed)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    batch, heads, seq, _ = q.shape
    return q.new_empty(batch, seq, heads, v.shape[-1]).transpose(1, 2)


torch.library.register_fake("qoqc::window_attention")(_fake)
