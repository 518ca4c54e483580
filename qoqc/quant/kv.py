"""Asymmetric 4- or 8-bit keys and values, per token and KV head, in pages of 64 tokens.

`x ~ code * scale + low`, both fp16, rounded before the codes are chosen, so that encoder and
decoder share one grid and a constant vector (scale 0) is exact to fp16. Page layouts for a head of
D channels, chosen for the loads of the attention kernel:

bits 4   K uint8 [64 tokens, D/2], byte (t, j): channel j low nibble, j + D/2 high (the rotate pair)
         V uint8 [D, 32],          byte (d, j): token j low nibble, token j + 32 high
bits 8   K uint8 [64 tokens, D];   V uint8 [D, 64]
words    int32 [2, 64] = fp16 scale | fp16 low << 16; row 0 for K, row 1 for V
"""

from __future__ import annotations

import torch

from qoqc.ir.spec import PAGE

HALF_PAGE = PAGE // 2
FP16_MAX = 65504.0


def kv_grid(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., D] and the fp16 scale and low [...] of `x` float [..., D].

    Values beyond fp16 saturate; NaN in a vector makes its scale NaN, so it never reads as a number.
    """
    top = 2**bits - 1
    xf = x.float()
    least, most = xf.aminmax(dim=-1, keepdim=True)
    low = least.clamp_(-FP16_MAX, FP16_MAX).half()
    base = low.float()
    span = most.clamp_(-FP16_MAX, FP16_MAX).sub_(base)
    scale = span.div_(top).clamp_(0, FP16_MAX).half()
    step = scale.float()
    inverse = torch.where(step > 0, step.reciprocal(), 0.0)
    codes = xf.sub(base).mul_(inverse).round_().clamp_(0, top).nan_to_num_(0.0)
    return codes.to(torch.uint8), scale[..., 0], low[..., 0]


def dequantize_kv(codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 values [..., D] of codes on a grid."""
    # the product is exact in fp32, so it makes no difference that this is not one fused step
    return codes.float().mul_(scale.float()[..., None]).add_(low.float()[..., None])


def fake_quantize_kv(x: torch.Tensor, bits: int) -> torch.Tensor:
    """What a read from the cache would give back for `x` [..., D], in x's dtype."""
    return dequantize_kv(*kv_grid(x.contiguous(), bits)).to(x.dtype)


def make_words(scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """fp16 scale and low [...] as one int32 word each."""
    return torch.stack((scale, low), dim=-1).view(torch.int32)[..., 0]


def split_words(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp16 scale and low of int32 words [...]."""
    halves = words.contiguous().view(torch.float16).view(*words.shape, 2)
    return halves[..., 0], halves[..., 1]


def pack_k(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [..., D] as stored bytes [..., D * bits / 8]."""
    if bits == 8:
        return codes
    half = codes.shape[-1] // 2
    return codes[..., :half] | (codes[..., half:] << 4)


def unpack_k(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_k`."""
    return stored if bits == 8 else torch.cat((stored & 15, stored >> 4), dim=-1)


def unpack_v(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Stored V pages uint8 [..., D, 32 or 64] as codes uint8 [..., 64, D]."""
    by_token = stored.transpose(-1, -2).contiguous()  # half the bytes to move than after the split
    return by_token if bits == 8 else torch.cat((by_token & 15, by_token >> 4), dim=-2)


def empty_pages(
    pages: int, kv_heads: int, k_dim: int, v_dim: int, bits: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zeroed k_pages [pages, H, 64, Dk*bits/8], v_pages [pages, H, Dv, 8*bits], words int32."""
    return (
        torch.zeros(pages, kv_heads, PAGE, k_dim * bits // 8, dtype=torch.uint8, device=device),
        torch.zeros(pages, kv_heads, v_dim, PAGE * bits // 8, dtype=torch.uint8, device=device),
        torch.zeros(pages, kv_heads, 2, PAGE, dtype=torch.int32, device=device),
    )
