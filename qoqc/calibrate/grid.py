"""The integer grid a weight may take: its scales and zeros, before the codes are chosen.

Values are computed as dequantize_weight does, integer first and one fp32 product, so that what a
search decides is what the packed weight gives back, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from qoqc.ir.spec import GROUP
from qoqc.quant.pack import pack_nibbles
from qoqc.quant.weight import PackedWeight


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grids of all weights [N, K]; `channel_scale * scale * (q4 - zero)` with q4 in 0..15.

    channel_scale  fp32 [N], 0 where a channel is all zeros
    scale          fp32 [N, G], whole numbers 1..16 (g128); None per channel
    zero           fp32 [N, G], whole numbers 0..15; G = ceil(K/128), or 1 per channel
    """

    channel_scale: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor

    @functools.cached_property
    def step(self) -> torch.Tensor:
        """The distance of neighbouring values, fp32 [N, G]; above 0, so that one can divide."""
        live = torch.where(self.channel_scale > 0, self.channel_scale, 1.0)[:, None]
        return live if self.scale is None else live * self.scale

    def column(self, k: int) -> Column:
        """The grid of input channel k."""
        group = 0 if self.scale is None else k // GROUP
        scale = None if self.scale is None else self.scale[:, group]
        return Column(self.channel_scale, scale, self.zero[:, group], self.step[:, group])

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The codes uint8 [N, K] nearest to `weight` fp32 [N, K]."""
        return self._columns(weight.shape[1]).codes(weight).to(torch.uint8)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The fp32 weight [N, K] that codes uint8 [N, K] stand for."""
        return self._columns(codes.shape[1]).values(codes.float())

    def pack(self, codes: torch.Tensor) -> PackedWeight:
        """The stored form of codes uint8 [N, K] on this grid."""
        n, k = codes.shape
        zero = self.zero.int()
        if self.scale is None:
            packed = pack_nibbles(codes)
            return PackedWeight(packed, self.channel_scale, None, zero[:, 0].contiguous(), n, k)
        scale = self.scale.int()
        word = (scale | ((128 - zero * scale) << 8)).t().contiguous()
        fill = zero[:, -1].to(torch.uint8) if k else None
        return PackedWeight(pack_nibbles(codes, fill), self.channel_scale, word, None, n, k)

    def _columns(self, k: int) -> Column:
        """All k columns at once."""
        if self.scale is None:
            return Column(self.channel_scale[:, None], None, self.zero, self.step)
        scale, zero, step = (
            x.repeat_interleave(GROUP, 1)[:, :k] for x in (self.scale, self.zero, self.step)
        )
        return Column(self.channel_scale[:, None], scale, zero, step)


@dataclasses.dataclass(frozen=True)
class Column:
    """Grids for weights of any shape that the fields, as those of Grid, broadcast to."""

    channel_scale: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor
    step: torch.Tensor

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as fp32 whole numbers."""
        return weight.div(self.step).round_().add_(self.zero).clamp_(0, 15)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The fp32 weights of codes given as fp32 whole numbers."""
        whole = codes - self.zero
        if self.scale is not None:
            whole *= self.scale
        return whole.mul_(self.channel_scale)
