"""Weight quantization by rounding to nearest, in the two formats of the product.

g128 (progressive, QServe paper section 4.1): level 1 is symmetric int8 per output channel within
[-119, 119]; level 2 splits each channel into groups of 128 with a uint8 scale and a uint4 zero:
`w ~ channel_scale * (q4 - zero) * group_scale`. Per channel: `w ~ channel_scale * (q4 - zero)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from qoqc.errors import Unsupported
from qoqc.ir.spec import GROUP, LEVEL1_MAX, TILE_N
from qoqc.quant.pack import ceil_div, pack_nibbles, unpack_nibbles

CHUNK = 2**24
"""Weights quantized at a time: rows are independent, and one needs about 24 bytes on the way."""


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A 4-bit weight of `out_features` N by `in_features` K.

    qweight        uint8 [ceil(N/128), ceil(K/128), 128, 64], see quant/pack.py
    channel_scale  fp32 [N]
    group_word     int32 [ceil(K/128), N], `s | (128 - zero*s) << 8` (g128 only, else None)
    channel_zero   int32 [N], 0..15 (per channel only, else None)

    The word serves the dequantization of four bytes at once, `(q4*s + a) ^ 0x80` with
    `a = 128 - zero*s`, exact because zero*s <= 128 and (15 - zero)*s <= 127 (LiquidGEMM's form).
    """

    qweight: torch.Tensor
    channel_scale: torch.Tensor
    group_word: torch.Tensor | None
    channel_zero: torch.Tensor | None
    out_features: int
    in_features: int

    @property
    def group_size(self) -> Literal[128, -1]:
        """The format: 128, or -1 for per channel."""
        return -1 if self.group_word is None else 128

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name, absent ones left out."""
        named = {
            "qweight": self.qweight,
            "channel_scale": self.channel_scale,
            "group_word": self.group_word,
            "channel_zero": self.channel_zero,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def quantize_weight(weight: torch.Tensor, group_size: Literal[128, -1]) -> PackedWeight:
    """Quantize `weight` [N, K] of any float dtype by rounding to nearest.

    Raises Unsupported when the weight holds NaN or infinity, ValueError for another group size.
    """
    if group_size not in (GROUP, -1):
        raise ValueError(f"group_size {group_size} is not one of {GROUP}, -1 (per channel)")
    n, k = weight.shape
    step = max(CHUNK // max(k, 1) // TILE_N, 1) * TILE_N
    pieces = [weight[i : i + step] for i in range(0, max(n, 1), step)]
    return concat_rows([_quantize_rows(piece, group_size) for piece in pieces])


def _quantize_rows(weight: torch.Tensor, group_size: Literal[128, -1]) -> PackedWeight:
    w = weight.detach().float()
    if not torch.isfinite(w).all():
        raise Unsupported("the weight holds NaN or infinite values; repair the checkpoint")
    return _quantize_grouped(w) if group_size == GROUP else _quantize_per_channel(w)


def _quantize_grouped(w: torch.Tensor) -> PackedWeight:
    n, k = w.shape
    groups = ceil_div(k, GROUP)
    channel_scale = w.abs().amax(1) / LEVEL1_MAX if k else w.new_zeros(n)
    w8 = torch.round(w / torch.where(channel_scale > 0, channel_scale, 1.0)[:, None])
    # a subnormal channel_scale has too few bits to divide the largest weight down to 119
    w8.clamp_(-LEVEL1_MAX, LEVEL1_MAX)
    padded = w8.new_zeros(n, groups * GROUP)
    padded[:, :k] = w8
    grouped = padded.view(n, groups, GROUP)
    scale, zero = group_grid(grouped.amin(-1), grouped.amax(-1))
    q4 = (torch.round(grouped / scale[..., None]) + zero[..., None]).clamp(0, 15)
    q4 = q4.to(torch.uint8).view(n, groups * GROUP)[:, :k]
    word = scale.int() | ((128 - zero.int() * scale.int()) << 8)
    fill = zero[:, -1].to(torch.uint8) if groups else None
    return PackedWeight(pack_nibbles(q4, fill), channel_scale, word.t().contiguous(), None, n, k)


def group_grid(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Level-2 scale (1..16) and zero (0..15) of groups with int8 range [low, high], as floats.

    Zero always lies inside the grid. Where rounding would break `(15 - zero)*scale <= 127` the
    zero moves up by one, which the protective range leaves room for.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.round((high - low) / 15).clamp(min=1)
    zero = torch.round(-low / scale).clamp(0, 15)
    zero = torch.where((15 - zero) * scale > 127, zero + 1, zero)
    if ((zero * scale > 128) | ((15 - zero) * scale > 127)).any():
        raise Unsupported("level-1 weights leave the protective range [-119, 119]")
    return scale, zero


def _quantize_per_channel(w: torch.Tensor) -> PackedWeight:
    n, k = w.shape
    empty = w.new_zeros(n)
    low = w.amin(1).clamp(max=0) if k else empty
    high = w.amax(1).clamp(min=0) if k else empty
    channel_scale = (high - low) / 15
    divisor = torch.where(channel_scale > 0, channel_scale, 1.0)
    zero = torch.round(-low / divisor).clamp(0, 15)
    q4 = (torch.round(w / divisor[:, None]) + zero[:, None]).clamp(0, 15).to(torch.uint8)
    return PackedWeight(pack_nibbles(q4), channel_scale, None, zero.int(), n, k)


def expand_int8(packed: PackedWeight) -> torch.Tensor:
    """The integer weight int8 [N, K] that the GEMM multiplies with: exact, zero point removed."""
    n, k = packed.out_features, packed.in_features
    if packed.group_word is None:
        assert packed.channel_zero is not None
        q4 = unpack_nibbles(packed.qweight, n, k)
        return q4.view(torch.int8) - packed.channel_zero[:, None].to(torch.int8)
    # in bytes, as the kernels do it: q4*s + a never leaves 0..255, so nothing wider is allocated
    padded = _padded_k(packed)
    q4 = unpack_nibbles(packed.qweight, n, padded).view(n, padded // GROUP, GROUP)
    word = packed.group_word.t()[..., None]
    w8 = (q4 * (word & 255).to(torch.uint8)).add_((word >> 8).to(torch.uint8))
    return w8.bitwise_xor_(0x80).view(torch.int8).view(n, padded)[:, :k].contiguous()


def dequantize_weight(packed: PackedWeight) -> torch.Tensor:
    """The weight fp32 [N, K] the format stands for."""
    return expand_int8(packed).float() * packed.channel_scale[:, None]


def rows(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Output channels `start:stop` as a packed weight of their own: exact, rows are independent."""
    if start == 0 and stop == packed.out_features:
        return packed
    word, zero = packed.group_word, packed.channel_zero
    if start % TILE_N == 0 and (stop % TILE_N == 0 or stop == packed.out_features):
        qweight = packed.qweight[start // TILE_N : ceil_div(stop, TILE_N)].clone()
    else:
        q4 = unpack_nibbles(packed.qweight, packed.out_features, _padded_k(packed))
        qweight = pack_nibbles(q4[start:stop])
    return PackedWeight(
        qweight,
        packed.channel_scale[start:stop].clone(),
        None if word is None else word[:, start:stop].clone(memory_format=torch.contiguous_format),
        None if zero is None else zero[start:stop].clone(),
        stop - start,
        packed.in_features,
    )


def concat_rows(parts: Sequence[PackedWeight]) -> PackedWeight:
    """Packed weights of one format and in_features, stacked along the output channels.

    Raises ValueError when the parts disagree.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.group_size != first.group_size:
            raise ValueError(
                f"parts of different format: group_size {part.group_size} and {first.group_size}"
            )
        if part.in_features != first.in_features:
            raise ValueError(
                f"parts of different in_features: {part.in_features} and {first.in_features}"
            )
    if len(parts) == 1:
        return first
    if all(part.out_features % TILE_N == 0 for part in parts[:-1]):
        qweight = torch.cat([part.qweight for part in parts])
    else:
        q4 = [unpack_nibbles(p.qweight, p.out_features, _padded_k(p)) for p in parts]
        qweight = pack_nibbles(torch.cat(q4))
    words = [p.group_word for p in parts if p.group_word is not None]
    zeros = [p.channel_zero for p in parts if p.channel_zero is not None]
    return PackedWeight(
        qweight,
        torch.cat([p.channel_scale for p in parts]),
        torch.cat(words, dim=1).contiguous() if words else None,
        torch.cat(zeros) if zeros else None,
        sum(p.out_features for p in parts),
        first.in_features,
    )


def reordered_rows(packed: PackedWeight, order: torch.Tensor) -> PackedWeight:
    """Output channels in another order, exact: row i of the result is row order[i], int64 [N]."""
    order = order.to(packed.qweight.device)
    tiles, k_tiles = packed.qweight.shape[:2]
    # a row's bytes lie together in every tile, whatever they hold; padding stays where it is
    whole = torch.arange(tiles * TILE_N, device=order.device)
    whole[: packed.out_features] = order
    lines = packed.qweight.transpose(1, 2).reshape(tiles * TILE_N, k_tiles, GROUP // 2)[whole]
    lines = lines.view(tiles, TILE_N, k_tiles, GROUP // 2).transpose(1, 2).contiguous()
    word, zero = packed.group_word, packed.channel_zero
    return PackedWeight(
        lines,
        packed.channel_scale[order],
        None if word is None else word[:, order].contiguous(),
        None if zero is None else zero[order],
        packed.out_features,
        packed.in_features,
    )


def _padded_k(packed: PackedWeight) -> int:
    return packed.qweight.shape[1] * GROUP
