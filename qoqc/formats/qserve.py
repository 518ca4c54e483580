"""QServe's checkpoints, per group of 128 and per channel: to our packed weights and back.

per group    W = s1_scales * (u * s2_scales + s2_zeros), the integers in int8; s2_zeros = -(z * s2)
per channel  W = u * s1_scales - s1_szeros, s1_szeros = fp16(z * s1_scales)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qoqc.errors import Unsupported
from qoqc.formats import qserve_layout as layout
from qoqc.formats.layer import Found, Layer
from qoqc.ir.spec import GROUP
from qoqc.quant.pack import pack_nibbles, unpack_nibbles
from qoqc.quant.weight import PackedWeight

MARK = "s1_scales"
"""The tensor that every quantized linear of a QServe checkpoint has."""

SUFFIXES = ("qweight", MARK, "s1_szeros", "s2_scales", "s2_zeros")

MAX_SCALE = 17
"""The largest level-2 scale QServe's byte-wise multiplication takes: 15 * 17 = 255."""

WHOLE = 2**-6
"""How far fp16(z * s) / s may be from the whole z: two roundings of 2**-11 relative, z <= 15."""


def read(layer: Layer) -> Found:
    """The weight of a linear, packed if our form has the same integers.

    Per group it has them, and so the same values bit for bit, unless a level-2 scale is 17, one
    more than our grid admits. Per channel ours differ by the rounding of s1_szeros.
    Raises Unsupported for tensors of wrong shape or with integers the format cannot hold.
    """
    scale = layer.take(MARK, (torch.float16,), None).float()
    n = scale.shape[0]
    qweight = layer.take("qweight", (torch.int8, torch.uint8), n, None)
    k = 2 * qweight.shape[1]
    multiple = layout.TILE if layer.has("s1_szeros") else GROUP
    if n % layout.TILE or k % multiple or not n * k:
        raise layer.wrong(
            "qweight",
            f"stands for [{n}, {k}]; QServe's sizes are multiples of {layout.TILE} and {multiple}",
        )
    codes = layout.unpack(qweight)
    if layer.has("s1_szeros"):
        return _per_channel(layer, codes, scale)
    return _grouped(layer, codes, scale)


def _per_channel(layer: Layer, codes: torch.Tensor, scale: torch.Tensor) -> Found:
    n, k = codes.shape
    offset = layer.take("s1_szeros", (torch.float16,), n).float()
    # both products are exact in fp32: 4 and 11 bits
    values = codes.float() * scale[:, None] - offset[:, None]
    exact_zero = torch.where(scale != 0, offset / scale, 0.0)
    zero = exact_zero.round()
    off_grid = (exact_zero - zero).abs() > WHOLE
    if (off_grid | (zero < 0) | (zero > 15) | ((scale == 0) & (offset != 0))).any():
        return Found(values)
    return Found(values, PackedWeight(pack_nibbles(codes), scale, None, zero.int(), n, k))


def _grouped(layer: Layer, codes: torch.Tensor, channel_scale: torch.Tensor) -> Found:
    n, k = codes.shape
    groups = k // GROUP
    stored = layer.take("s2_scales", (torch.int8,), groups, n)
    scale = layout.unshuffle(stored).t().int()
    if ((scale < 0) | (scale > MAX_SCALE)).any():
        raise layer.wrong("s2_scales", f"is not within 0..{MAX_SCALE}; the file is damaged")
    # -(z*s) modulo 256; z*s is at most 255
    product = -layout.unshuffle(layer.take("s2_zeros", (torch.int8,), groups, n)).t().int() & 255
    zero = torch.where(scale > 0, product // scale.clamp(min=1), 0)
    if ((zero * scale != product) | (zero > 15)).any():
        raise layer.wrong("s2_zeros", "is not -(0..15) times s2_scales; the file is damaged")
    w8 = (codes.view(n, groups, GROUP).int() - zero[..., None]) * scale[..., None]
    if ((w8 < -128) | (w8 > 127)).any():
        raise layer.wrong("qweight", "leaves int8 at level 2, where QServe's kernels would wrap")
    values = w8.view(n, k).float() * channel_scale[:, None]
    if (scale == MAX_SCALE).any():
        return Found(values, scale=scale * channel_scale[:, None])
    packed = _pack_grouped(w8, scale.clamp(min=1), zero, channel_scale)
    return Found(values, packed)


def _pack_grouped(
    w8: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, channel_scale: torch.Tensor
) -> PackedWeight:
    """The packed form of int8 weights int32 [N, G, 128] that are multiples of scale [N, G].

    Our dequantization wants zero*s <= 128 and (15 - zero)*s <= 127 whether or not the outer codes
    occur; where QServe's zero is outside, it moves there, and the codes with it. For s <= 16 there
    is such a zero, and as the weights are within int8, the moved codes are within 0..15.
    """
    n, groups, _ = w8.shape
    moved = torch.minimum(torch.maximum(zero, 15 - 127 // scale), 128 // scale)
    codes = w8 // scale[..., None] + moved[..., None]
    word = (scale | ((128 - moved * scale) << 8)).int().t().contiguous()
    packed = pack_nibbles(codes.to(torch.uint8).view(n, groups * GROUP))
    return PackedWeight(packed, channel_scale, word, None, n, groups * GROUP)


def require_unit_norms(where: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise Unsupported unless every norm weight is 1.

    QServe's loaders skip the tensors of norms: its models have them folded into the linears that
    follow, as the paper's rotation does (section 4.2), and their norms multiply by 1.
    """
    for name, tensor in tensors.items():
        if "norm" in name and name.endswith(".weight") and not (tensor == 1).all():
            raise Unsupported(
                f"{where}: {name} is not 1 throughout, and QServe takes every norm's weight as 1; "
                "fold the norms into the linears (qoqc compile --calibrate does)"
            )


def write(name: str, packed: PackedWeight) -> dict[str, torch.Tensor]:
    """The tensors of a linear by QServe's suffixes. `read` gives `packed` back, bit for bit, where
    its channel scales are fp16 numbers; others are rounded to fp16, the integers stay.

    Raises Unsupported for sizes that QServe's tiles do not take, and for scales that fp16 does
    not hold to its usual precision.
    """
    n, k = packed.out_features, packed.in_features
    multiple = GROUP if packed.group_word is not None else layout.TILE
    if n % layout.TILE or k % multiple or not n * k:
        raise Unsupported(
            f"{name}: [{n}, {k}] cannot be stored for QServe, whose sizes are multiples of "
            f"{layout.TILE} and {multiple}; leave it in 16 bit (--exclude)"
        )
    scale = packed.channel_scale.half()
    magnitude = packed.channel_scale.abs()
    tiny = torch.finfo(torch.float16).tiny
    if ((magnitude > 0) & ((magnitude < tiny) | ~torch.isfinite(scale))).any():
        raise Unsupported(
            f"{name}: a channel scale is outside the normal range of fp16, which QServe stores it "
            "in; leave it in 16 bit (--exclude)"
        )
    codes = unpack_nibbles(packed.qweight, n, k)
    tensors = {"qweight": layout.pack(codes), MARK: scale}
    if packed.group_word is None:
        assert packed.channel_zero is not None
        szeros = packed.channel_zero.float() * scale.float()
        if not torch.isfinite(szeros.half()).all():
            raise Unsupported(
                f"{name}: zero times scale overflows fp16; leave it in 16 bit (--exclude)"
            )
        return {**tensors, "s1_szeros": szeros.half()}
    group_scale = packed.group_word & 255
    product = 128 - (packed.group_word >> 8)
    tensors["s2_scales"] = layout.shuffle(group_scale.to(torch.int8))
    tensors["s2_zeros"] = layout.shuffle((-product).to(torch.int8))
    return tensors
