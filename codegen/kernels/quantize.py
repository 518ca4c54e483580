"""Per-token int8 quantization of activations: one program per few tokens.

x [M, K] 16 or 32 bit, rows `stride_m` apart -> xq int8 [M, K], token_scale fp32 [M], token_sum
int32 [M]. Equal to quant/activation.quantize_act bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels import token_tiles
from qoqc.codegen.kernels.pieces import depends_on, round_half_even
from qoqc.codegen.kernels.token_rows import empty_quantized, rows_of
from qoqc.ir.spec import OUTPUT_DTYPES
from qoqc.quant.activation import TINY_TOKEN
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

TINY = tl.constexpr(TINY_TOKEN)
INFINITY_BITS = tl.constexpr(0x7F800000)

ONE_PASS = 16384
"""The longest token that is kept in registers: 128 values per thread at 16 warps, in fp32."""


@dataclasses.dataclass(frozen=True)
class QuantizeSpec:
    """Quantization of tokens of `features` values of `dtype`."""

    features: int
    dtype: torch.dtype


@triton.jit
def magnitude_bits(x):
    """The bits of |x| as int32: they order like the numbers, infinity and then NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def live_absmax(top):
    """absmax of tokens with magnitude bits `top`; 0 for those that quantize to zeros."""
    absmax = top.to(tl.float32, bitcast=True)
    return tl.where((top < INFINITY_BITS) & (absmax >= TINY), absmax, 0.0)


@triton.jit
def quantize_block(x, top):
    """x fp32 [ROWS, BLOCK_K], top int32 [ROWS] -> the integers, int32 [ROWS, BLOCK_K]."""
    absmax = live_absmax(top)
    live = absmax > 0
    # 127 / absmax rounded twice, as torch does it
    inverse = tl.where(live, tl.div_rn(1.0, tl.where(live, absmax, 1.0)) * 127.0, 0.0)
    product = tl.where((top < INFINITY_BITS)[:, None], x, 0.0) * inverse[:, None]
    return tl.clamp(round_half_even(product), -127.0, 127.0).to(tl.int32)


@triton.jit(do_not_specialize=["M"])
def quantize_kernel(
    x_ptr,  # [M, K]
    stride_m,
    xq_ptr,  # [M, K] int8
    scale_ptr,  # [M] fp32
    sum_ptr,  # [M] int32
    M,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOOP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Quantize the tokens pid * ROWS + 0..ROWS-1."""
    if DEPENDENT:
        # the weights of the GEMM that comes next may be on their way before this one's input is
        gdc_launch_dependents()
        gdc_wait()
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = offs_m < M
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + (offs_m * stride_m)[:, None]
    xq_rows = xq_ptr + (offs_m * K)[:, None]
    if LOOP:
        tops = tl.zeros((ROWS, BLOCK_K), dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            inside = in_m[:, None] & (start + offs_k < K)[None, :]
            x = tl.load(x_rows + (start + offs_k)[None, :], mask=inside, other=0.0)
            tops = tl.maximum(tops, magnitude_bits(x.to(tl.float32)))
        top = tl.max(tops, axis=1)
        sums = tl.zeros((ROWS, BLOCK_K), dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            inside = in_m[:, None] & (start + offs_k < K)[None, :]
            x = tl.load(x_rows + (start + offs_k)[None, :], mask=inside, other=0.0)
            q = quantize_block(x.to(tl.float32), top)
            sums += q
            tl.store(xq_rows + (start + offs_k)[None, :], q.to(tl.int8), mask=inside)
        total = tl.sum(sums, axis=1)
    else:
        inside = in_m[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_rows + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
        top = tl.max(magnitude_bits(x), axis=1)
        q = quantize_block(x, top)
        tl.store(xq_rows + offs_k[None, :], q.to(tl.int8), mask=inside)
        total = tl.sum(q, axis=1)
    scale = tl.where(top < INFINITY_BITS, tl.div_rn(live_absmax(top), 127.0), float("nan"))
    tl.store(scale_ptr + offs_m, scale, mask=in_m)
    tl.store(sum_ptr + offs_m, total, mask=in_m)


def launch(kernel: Launch, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize `x` [..., K], which `spec_of` accepts, copied first where its rows have gaps.

    Returns xq int8 [..., K], token_scale fp32 [...] and token_sum int32 [...].
    """
    outputs = empty_quantized(x)
    tokens = outputs[1].numel()
    if tokens:
        rows, stride = rows_of(x)
        kernel((ceil_div(tokens, kernel.tile["ROWS"]),), rows, stride, *outputs, tokens)
    return outputs


def spec_of(x: torch.Tensor) -> QuantizeSpec:
    """The spec of a call; ValueError for what the kernel does not take."""
    if x.dtype not in OUTPUT_DTYPES or x.dim() == 0:
        raise ValueError(
            f"quantize_act: x must be bfloat16, float16 or float32 with at least one axis, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    return QuantizeSpec(x.shape[-1], x.dtype)


def bind(spec: QuantizeSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `quantize_kernel`."""
    return {"K": spec.features, **dict(tile.constexprs)}


def tile_of(features: int, values: int, num_warps: int, device: DeviceKey) -> Tile:
    """A tile of about `values` values: whole tokens where they fit, else a piece of one."""
    padded = max(16, triton.next_power_of_2(features))
    loop = padded > ONE_PASS
    block = min(padded, 4096) if loop else padded
    rows = 1 if loop else max(1, values // block)
    constexprs = (("ROWS", rows), ("BLOCK_K", block), ("LOOP", int(loop)), depends_on(device))
    return Tile(constexprs, num_warps, num_stages=2)


def heuristic(spec: QuantizeSpec, size: int, device: DeviceKey) -> Tile:
    """Sixteen values per thread; where tokens are plenty they are grouped, and up to four warps a
    token: 8192 tokens of 14336 channels take 92 us on an H200 instead of 116.

    Long tokens get 32 warps while each has an SM: a Llama-3-8B layer's linears with what comes
    before them take 51.3 us with 16 tokens on an H200 instead of 52.6, with 256 one more.
    """
    padded = min(ONE_PASS, max(16, triton.next_power_of_2(spec.features)))
    plenty = size >= 4 * device.sm_count
    paired = token_tiles.come_in_pairs(padded, size, device)
    values = 2048 if plenty else 2 * padded if paired else padded
    alone = device.arch == 90 and size <= device.sm_count and spec.features <= ONE_PASS
    most = 4 if plenty else 32 if alone else 16
    num_warps = min(most, max(1, max(padded, values) // 512))
    return tile_of(spec.features, values, num_warps, device)


def candidates(spec: QuantizeSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Tokens per program times warps."""
    tiles = {heuristic(spec, size, device): None}
    for values in (1, 2048, 4096):
        for num_warps in (1, 2, 4, 8, 16):
            tiles[tile_of(spec.features, values, num_warps, device)] = None
    return tuple(tiles)


def trial(spec: QuantizeSpec, size: int, device: torch.device) -> Trial:
    """Quantize `size` random tokens."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(size, spec.features, generator=generator, device=device).to(spec.dtype)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        return launch(kernel, x)

    return run


SELFCHECK = """
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, k, rows = getattr(torch, SPEC["dtype"]), SPEC["features"], TILE["ROWS"]
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    for m in (1, 5) if device == "cpu" else (1, 64, 4096):
        x = (torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]).to(dtype)
        x[0] = 0
        xf = x.float()
        absmax = xf.abs().amax(1) if k else torch.zeros(m)
        inverse = torch.where(absmax > 0, absmax.reciprocal() * 127, 0)
        want = (xf * inverse[:, None]).round().clamp(-127, 127).to(torch.int8)
        x = x.to(device)
        xq = torch.empty(m, k, dtype=torch.int8, device=device)
        scale = torch.empty(m, dtype=torch.float32, device=device)
        total = torch.empty(m, dtype=torch.int32, device=device)

        def run():
            grid = (triton.cdiv(m, rows),)
            quantize_kernel[grid](x, x.stride(0), xq, scale, total, m, **options)

        run()
        assert torch.equal(xq.cpu(), want), f"m={m}: wrong integers"
        assert torch.equal(scale.cpu(), absmax / 127), f"m={m}: wrong scales"
        assert torch.equal(total.cpu(), want.sum(1, dtype=torch.int32)), f"m={m}: wrong sums"
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
        print(f"m={m} k={k} {SPEC['dtype']}: equal to torch, {took}")
"""


QUANTIZE = Family(
    "quantize", quantize_kernel, bind, heuristic, candidates, SELFCHECK, trial, pdl=True
)
