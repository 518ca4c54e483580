"""8-bit weights by means of the 4-bit format: two nibbles of each, side by side."""

from __future__ import annotations

import torch

from qoqc.errors import Unsupported
from qoqc.ir.spec import GROUP, TILE_N
from qoqc.quant.pack import pack_nibbles
from qoqc.quant.weight import CHUNK, PackedWeight, concat_rows


def quantize_weight8(weight: torch.Tensor) -> PackedWeight:
    """`weight` [N, K] as int8, symmetric per output channel, in the g128 format: [N, 2 * K].

    `w8 = 16 * (high - 8) + low`: the first K input channels hold `high` in groups of scale 16 and
    zero 8, the others `low` in groups of scale 1 and zero 0. So `[xq, xq] @ packed.T` is exactly
    `xq @ w8.T`, by the kernels of 4-bit weights and from as many bytes as int8 has. K must be a
    multiple of 128. Raises Unsupported when the weight holds NaN or infinity.
    """
    n, k = weight.shape
    if k % GROUP:
        raise ValueError(f"{k} input channels are no multiple of {GROUP}")
    step = max(CHUNK // max(k, 1) // TILE_N, 1) * TILE_N
    return concat_rows([_quantize_rows8(weight[i : i + step]) for i in range(0, max(n, 1), step)])


def _quantize_rows8(weight: torch.Tensor) -> PackedWeight:
    w = weight.detach().float()
    if not torch.isfinite(w).all():
        raise Unsupported("the weight holds NaN or infinite values; repair the checkpoint")
    n, k = w.shape
    channel_scale = w.abs().amax(1) / 127 if k else w.new_zeros(n)
    w8 = torch.round(w / torch.where(channel_scale > 0, channel_scale, 1.0)[:, None])
    codes = w8.clamp_(-127, 127).add_(128).to(torch.uint8)
    q4 = torch.cat((codes >> 4, codes & 15), dim=1)
    # scale | (128 - zero * scale) << 8
    words = torch.tensor([16, 1 | 128 << 8], dtype=torch.int32, device=w.device)
    word = words.repeat_interleave(k // GROUP)[:, None].repeat(1, n)
    return PackedWeight(pack_nibbles(q4), channel_scale, word, None, n, 2 * k)
