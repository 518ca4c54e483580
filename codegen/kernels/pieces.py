"""Jitted helpers that several kernel families share, and checks that several launchers share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qoqc.runtime.device import DeviceKey

INTERPRETED_DEVICE = "interpreter"
"""Name of the DeviceKey under which kernels run in Triton's interpreter: no inline PTX there."""

# both nibbles of four bytes, as eight int8 values 0..15
UNPACK_PTX = tl.constexpr("""
{
and.b32 $0, $2, 0x0f0f0f0f;
shr.u32 $1, $2, 4;
and.b32 $1, $1, 0x0f0f0f0f;
}
""")

# the same, then (q4 * s + a) ^ 0x80 on four bytes at once: no byte overflows into the next,
# because 15 * s + a <= 255 holds for every group word (quant/weight.py)
UNPACK_GROUP_PTX = tl.constexpr("""
{
.reg .b32 low, high, scale, offset;
and.b32 scale, $3, 0xff;
prmt.b32 offset, $3, 0, 0x1111;
and.b32 low, $2, 0x0f0f0f0f;
shr.u32 high, $2, 4;
and.b32 high, high, 0x0f0f0f0f;
mad.lo.u32 low, low, scale, offset;
mad.lo.u32 high, high, scale, offset;
xor.b32 $0, low, 0x80808080;
xor.b32 $1, high, 0x80808080;
}
""")


@triton.jit
def round_half_even(x):
    """The integer nearest to fp32 `x`, ties to even, still fp32. Exact for |x| <= 2**22.

    Adding 1.5 * 2**23 leaves no room for a fraction; it must not be contracted into an FMA.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_to_bf16(x):
    """fp32 `x` rounded to a bfloat16 value (nearest, ties to even), still fp32.

    For Triton's interpreter only, whose conversion to bfloat16 cuts the low bits off.
    """
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)


@triton.jit
def rounded(y, KIND: tl.constexpr, ROUND_BF16: tl.constexpr):
    """fp32 `y` rounded to values of KIND, still fp32."""
    if ROUND_BF16:
        y = round_to_bf16(y)
    return y.to(KIND).to(tl.float32)


@triton.jit
def unpack_int4(packed):
    """uint8 -> the low and the high nibbles as int8 0..15."""
    return (packed & 15).to(tl.int8), (packed >> 4).to(tl.int8)


@triton.jit
def unpack_int4_ptx(packed):
    """`unpack_int4` in three instructions per four bytes."""
    return tl.inline_asm_elementwise(
        UNPACK_PTX, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def dequantize_group(packed, word):
    """uint8 nibble pairs and the int32 word of their group -> two int8 weights, level 1."""
    scale = (word & 255).to(tl.uint8)
    offset = (word >> 8).to(tl.uint8)
    low = ((packed & 15) * scale + offset) ^ 128
    high = ((packed >> 4) * scale + offset) ^ 128
    return low.to(tl.int8, bitcast=True), high.to(tl.int8, bitcast=True)


@triton.jit
def dequantize_group_ptx(packed, word):
    """`dequantize_group` with two ALU instructions per four weights after the unpacking.

    Four neighbouring bytes of a thread must share their word: they do wherever a thread holds
    runs of four along K, as the layouts of an int8 dot operand and of a row-major load have it.
    """
    return tl.inline_asm_elementwise(
        UNPACK_GROUP_PTX,
        "=r,=r,r,r,r,r,r",
        [packed, word],
        dtype=(tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )


@triton.jit
def grouped_tile(pid, m_tiles, n_tiles, GROUP_M: tl.constexpr):
    """The (m, n) tile of program `pid`: GROUP_M tiles of m share their weights in L2."""
    width = GROUP_M * n_tiles
    first = (pid // width) * GROUP_M
    rows = tl.minimum(m_tiles - first, GROUP_M)
    return first + (pid % width) % rows, (pid % width) // rows


def depends_on(device: DeviceKey) -> tuple[str, int]:
    """The constexpr DEPENDENT: may a kernel start while the one before it ends? Since sm_90."""
    return "DEPENDENT", int(device.name != INTERPRETED_DEVICE and device.arch >= 90)


def check_device(op: str, **tensors: torch.Tensor | None) -> torch.device:
    """The one device of the given tensors; ValueError if they are on several."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    first = next(iter(devices.values()))
    if any(device != first for device in devices.values()):
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {listed}")
    return first
