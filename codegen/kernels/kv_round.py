"""What a read from a 4- or 8-bit cache would give back for keys or values: one program per few.

x [B, H, S, D] 16 or 32 bit, any strides -> y of its shape and dtype, contiguous. Equal to
quant/kv.fake_quantize_kv bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.attention import unit_stride
from qoqc.codegen.kernels.pieces import INTERPRETED_DEVICE, rounded
from qoqc.codegen.kernels.pieces_codes import codes_of, extent, grid_of
from qoqc.ir.spec import OUTPUT_DTYPES
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

VALUES = 2048
"""Values of a program's block, 16 per thread of four warps."""


@dataclasses.dataclass(frozen=True)
class RoundSpec:
    """Vectors of `dim` values of `dtype`, rounded to a grid of `bits`."""

    dim: int
    bits: int
    dtype: torch.dtype


@triton.jit
def half_of(bits):
    """The fp16 number whose bits are the low half of int32 `bits`, as fp32."""
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["count", "heads", "tokens"])
def kv_round_kernel(
    x_ptr,  # [B, H, S, D]
    stride_b,
    stride_h,
    stride_s,
    y_ptr,  # [B, H, S, D]
    count,  # B * H * S
    heads,
    tokens,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Round the vectors pid * ROWS + 0..ROWS-1."""
    TOP: tl.constexpr = 15.0 if BITS == 4 else 255.0
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_D)
    live = (row < count)[:, None] & (c < DIM)[None, :]
    b, h, s = row // tokens // heads, row // tokens % heads, row % tokens
    start = b * stride_b + h * stride_h + s * stride_s
    x = tl.load(x_ptr + start[:, None] + c[None, :], mask=live, other=0.0).to(tl.float32)
    low, high, broken = extent(x, live)
    low, inverse, word = grid_of(low, high, broken, TOP)
    # the product is exact, so that it makes no difference whether the sum is fused with it
    y = codes_of(x, low, inverse, TOP).to(tl.float32) * half_of(word)[:, None] + low
    kind: tl.constexpr = y_ptr.dtype.element_ty
    y = rounded(y, kind, ROUND_BF16)
    tl.store(y_ptr + (row * DIM)[:, None] + c[None, :], y.to(kind), mask=live)


def launch(kernel: Launch, x: torch.Tensor) -> torch.Tensor:
    """`x` [..., D] as the cache would give it back."""
    four = x if x.dim() == 4 else x.reshape(1, 1, -1, x.shape[-1])
    four = unit_stride(four)
    y = torch.empty(four.shape, dtype=x.dtype, device=x.device)
    _, heads, tokens, dim = four.shape
    if y.numel():
        count = y.numel() // dim
        grid = (ceil_div(count, kernel.tile["ROWS"]),)
        kernel(grid, four, *four.stride()[:3], y, count, heads, tokens)
    return y.view(x.shape)


def spec_of(x: torch.Tensor, bits: Literal[4, 8]) -> RoundSpec:
    """The spec of a call; ValueError for what the kernel does not take."""
    if x.dtype not in OUTPUT_DTYPES or x.dim() == 0 or bits not in (4, 8):
        raise ValueError(
            f"kv4_round: x must be bfloat16, float16 or float32 with at least one axis and bits 4 "
            f"or 8, got {x.dtype} {tuple(x.shape)} and {bits}"
        )
    return RoundSpec(x.shape[-1], bits, x.dtype)


def bind(spec: RoundSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `kv_round_kernel`."""
    return {"DIM": spec.dim, "BITS": spec.bits, **dict(tile.constexprs)}


def _tile(spec: RoundSpec, values: int, num_warps: int, device: DeviceKey) -> Tile:
    block = triton.next_power_of_2(max(spec.dim, 1))
    interpreted = device.name == INTERPRETED_DEVICE
    constexprs = {
        "ROWS": max(1, values // block),
        "BLOCK_D": block,
        # the interpreter cuts where hardware rounds
        "ROUND_BF16": int(interpreted and spec.dtype is torch.bfloat16),
    }
    return Tile(tuple(constexprs.items()), num_warps, num_stages=1)


def heuristic(spec: RoundSpec, size: int, device: DeviceKey) -> Tile:
    """Two 16-byte loads per thread."""
    return _tile(spec, VALUES, 4, device)


def candidates(spec: RoundSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Vectors per program times warps."""
    tiles = {heuristic(spec, size, device): None}
    for values in (1024, 2048, 4096):
        for num_warps in (2, 4, 8):
            tiles[_tile(spec, values, num_warps, device)] = None
    return tuple(tiles)


def trial(spec: RoundSpec, size: int, device: torch.device) -> Trial:
    """Round `size` random tokens of 8 heads."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, size, 8, spec.dim, generator=generator, device=device).to(spec.dtype)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        return (launch(kernel, x.transpose(1, 2)),)

    return run


SELFCHECK = """
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if TILE["ROUND_BF16"] and device == "cuda":
        raise SystemExit("this kernel rounds for Triton's interpreter: run it without a GPU")
    dtype, dim, top = getattr(torch, SPEC["dtype"]), SPEC["dim"], 2 ** SPEC["bits"] - 1
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    heads = 3
    for tokens in (1, 70) if device == "cpu" else (1, 70, 8192):
        x = torch.randn(2, heads, tokens, dim).to(dtype)
        xf = x.float()
        low = xf.amin(-1, keepdim=True).half().float()
        scale = ((xf.amax(-1, keepdim=True) - low) / top).clamp(min=0).half().float()
        inverse = torch.where(scale > 0, 1 / scale, 0)
        want = (((xf - low) * inverse).round().clamp(0, top) * scale + low).to(dtype)
        x = x.to(device)
        y = torch.empty_like(x)
        count = 2 * heads * tokens

        def run():
            grid = (triton.cdiv(count, TILE["ROWS"]),)
            kv_round_kernel[grid](x, *x.stride()[:3], y, count, heads, tokens, **options)

        run()
        assert torch.equal(y.cpu(), want), f"{tokens} tokens: wrong values"
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
        print(f"{tokens} tokens x {dim} {SPEC['dtype']}: equal to torch, {took}")
"""

KV_ROUND = Family("kv_round", kv_round_kernel, bind, heuristic, candidates, SELFCHECK, trial)
