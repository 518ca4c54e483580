"""Residual addition, norm and per-token int8 quantization: one program per few tokens.

x [M, K] 16 or 32 bit (+ residual [M, K]), rows some stride apart, weight and bias [K] -> xq int8
[M, K], token_scale fp32 [M], token_sum int32 [M], the sum [M, K] and, if kept, the norm [M, K].
As ir/glue.norm_quant; only the order of the sums over K differs, so the norm may come out one
step of its dtype away where it lies at a border of rounding. What follows it is equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qoqc.codegen.family import Family, Launch, Tile
from qoqc.codegen.kernels import token_tiles
from qoqc.codegen.kernels.norm_call import NormCall, NormSpec, NormTrial, Outputs
from qoqc.codegen.kernels.pieces import rounded
from qoqc.codegen.kernels.quantize import (
    INFINITY_BITS,
    live_absmax,
    magnitude_bits,
    quantize_block,
)
from qoqc.codegen.kernels.token_rows import rows_of
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

ONE_PASS = 8192
"""The longest token that is kept in registers: 16 fp32 values per thread at 16 warps."""


@triton.jit
def load_sum(
    x_rows,  # [ROWS, 1] pointers
    residual_rows,
    offs_k,
    inside,
    KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """x + residual, fp32 values of KIND [ROWS, BLOCK_K]; 0 outside."""
    x = tl.load(x_rows + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_rows + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
        x = rounded(x, KIND, ROUND_BF16)
    return x


@triton.jit
def scale_block(
    unit,  # [ROWS, BLOCK_K] fp32, of mean square 1
    weight_ptr,
    bias_ptr,
    offs_k,
    in_k,
    OFFSET: tl.constexpr,
    KIND: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Weight and bias, rounded to KIND: fp32 [ROWS, BLOCK_K]."""
    if ROUND_FIRST:
        unit = rounded(unit, KIND, ROUND_BF16)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_k, mask=in_k, other=0.0).to(tl.float32)
        if OFFSET != 0:
            weight += OFFSET
        unit *= weight[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_k, mask=in_k, other=0.0).to(tl.float32)
        unit += bias[None, :]
    return rounded(unit, KIND, ROUND_BF16)


@triton.jit(do_not_specialize=["M"])
def norm_quantize_kernel(
    x_ptr,  # [M, K]
    stride_m,
    residual_ptr,  # [M, K], read if HAS_RESIDUAL
    residual_stride_m,
    weight_ptr,  # [K], read if HAS_WEIGHT
    bias_ptr,  # [K], read if HAS_BIAS
    xq_ptr,  # [M, K] int8
    scale_ptr,  # [M] fp32
    sum_ptr,  # [M] int32
    total_ptr,  # [M, K], written if HAS_RESIDUAL
    normed_ptr,  # [M, K], written if KEEP
    M,
    K: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOOP: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Normalize and quantize the tokens pid * ROWS + 0..ROWS-1."""
    if DEPENDENT:
        # the weights of the GEMM that comes next may be on their way before this one's input is
        gdc_launch_dependents()
        gdc_wait()
    kind: tl.constexpr = x_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = offs_m < M
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + (offs_m * stride_m)[:, None]
    residual_rows = residual_ptr + (offs_m * residual_stride_m)[:, None]
    out_rows = (offs_m * K)[:, None]
    if LOOP:
        # the sum is computed anew in every loop: what a thread wrote another may not see yet
        sums = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            offs = start + offs_k
            inside = in_m[:, None] & (offs < K)[None, :]
            x = load_sum(x_rows, residual_rows, offs, inside, kind, HAS_RESIDUAL, ROUND_BF16)
            if HAS_RESIDUAL:
                tl.store(total_ptr + out_rows + offs[None, :], x.to(kind), mask=inside)
            if CENTRED:
                sums += x
            else:
                sums += x * x
        total = tl.sum(sums, axis=1)
        mean = tl.zeros((ROWS,), dtype=tl.float32)
        if CENTRED:
            mean = tl.div_rn(total, K * 1.0)
            sums = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
            for start in range(0, K, BLOCK_K):
                offs = start + offs_k
                inside = in_m[:, None] & (offs < K)[None, :]
                x = load_sum(x_rows, residual_rows, offs, inside, kind, HAS_RESIDUAL, ROUND_BF16)
                x = tl.where(inside, x - mean[:, None], 0.0)
                sums += x * x
            total = tl.sum(sums, axis=1)
        root = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, K * 1.0) + EPS))
        tops = tl.zeros((ROWS, BLOCK_K), dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            offs = start + offs_k
            inside = in_m[:, None] & (offs < K)[None, :]
            x = load_sum(x_rows, residual_rows, offs, inside, kind, HAS_RESIDUAL, ROUND_BF16)
            if CENTRED:
                x = tl.where(inside, x - mean[:, None], 0.0)
            y = scale_block(
                x * root[:, None], weight_ptr, bias_ptr, offs, offs < K,
                OFFSET, kind, HAS_WEIGHT, HAS_BIAS, ROUND_FIRST, ROUND_BF16,
            )  # fmt: skip
            tops = tl.maximum(tops, magnitude_bits(y))
        top = tl.max(tops, axis=1)
        counts = tl.zeros((ROWS, BLOCK_K), dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            offs = start + offs_k
            inside = in_m[:, None] & (offs < K)[None, :]
            x = load_sum(x_rows, residual_rows, offs, inside, kind, HAS_RESIDUAL, ROUND_BF16)
            if CENTRED:
                x = tl.where(inside, x - mean[:, None], 0.0)
            y = scale_block(
                x * root[:, None], weight_ptr, bias_ptr, offs, offs < K,
                OFFSET, kind, HAS_WEIGHT, HAS_BIAS, ROUND_FIRST, ROUND_BF16,
            )  # fmt: skip
            q = quantize_block(y, top)
            counts += q
            tl.store(xq_ptr + out_rows + offs[None, :], q.to(tl.int8), mask=inside)
            if KEEP:
                tl.store(normed_ptr + out_rows + offs[None, :], y.to(kind), mask=inside)
        count = tl.sum(counts, axis=1)
    else:
        inside = in_m[:, None] & (offs_k < K)[None, :]
        x = load_sum(x_rows, residual_rows, offs_k, inside, kind, HAS_RESIDUAL, ROUND_BF16)
        if HAS_RESIDUAL:
            tl.store(total_ptr + out_rows + offs_k[None, :], x.to(kind), mask=inside)
        if CENTRED:
            mean = tl.div_rn(tl.sum(x, axis=1), K * 1.0)
            x = tl.where(inside, x - mean[:, None], 0.0)
        total = tl.sum(x * x, axis=1)
        root = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, K * 1.0) + EPS))
        y = scale_block(
            x * root[:, None], weight_ptr, bias_ptr, offs_k, offs_k < K,
            OFFSET, kind, HAS_WEIGHT, HAS_BIAS, ROUND_FIRST, ROUND_BF16,
        )  # fmt: skip
        if KEEP:
            tl.store(normed_ptr + out_rows + offs_k[None, :], y.to(kind), mask=inside)
        # outside the token y is 0, or NaN where all of the token is (0 * root, and root infinite)
        top = tl.max(magnitude_bits(y), axis=1)
        q = quantize_block(y, top)
        tl.store(xq_ptr + out_rows + offs_k[None, :], q.to(tl.int8), mask=inside)
        count = tl.sum(q, axis=1)
    scale = tl.where(top < INFINITY_BITS, tl.div_rn(live_absmax(top), 127.0), float("nan"))
    tl.store(scale_ptr + offs_m, scale, mask=in_m)
    tl.store(sum_ptr + offs_m, count, mask=in_m)


def launch(kernel: Launch, call: NormCall) -> Outputs:
    """The five outputs of qoqc::norm_quant for checked tensors, see NormCall."""
    outputs = call.empty_outputs()
    start(kernel, call, outputs)
    return outputs


def start(kernel: Launch, call: NormCall, outputs: Outputs) -> None:
    """Launch on checked tensors; `outputs` as NormCall.empty_outputs made them."""
    tokens = call.tokens
    if not tokens:
        return
    x, stride = rows_of(call.x)
    residual, residual_stride = (x, stride) if call.residual is None else rows_of(call.residual)
    kernel(
        (ceil_div(tokens, kernel.tile["ROWS"]),),
        x,
        stride,
        residual,
        residual_stride,
        x if call.weight is None else call.weight,
        x if call.bias is None else call.bias,
        *outputs,
        tokens,
    )


def bind(spec: NormSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `norm_quantize_kernel`."""
    return {
        "K": spec.features,
        "EPS": spec.eps,
        "OFFSET": spec.offset,
        "CENTRED": int(spec.kind != "rms"),
        "ROUND_FIRST": int(spec.round_first),
        "HAS_RESIDUAL": int(spec.has_residual),
        "HAS_WEIGHT": int(spec.has_weight),
        "HAS_BIAS": int(spec.has_bias),
        "KEEP": int(spec.keep),
        **dict(tile.constexprs),
    }


def heuristic(spec: NormSpec, size: int, device: DeviceKey) -> Tile:
    """Whole tokens in registers."""
    return token_tiles.heuristic(spec.features, spec.dtype, size, device, ONE_PASS)


def candidates(spec: NormSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Tokens per program times warps."""
    return token_tiles.candidates(spec.features, spec.dtype, size, device, ONE_PASS)


def trial(spec: NormSpec, size: int, device: torch.device) -> NormTrial:
    """The norm of `size` random tokens."""
    return NormTrial(start, spec, size, device)


SELFCHECK = """
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if TILE["ROUND_BF16"] and device == "cuda":
        raise SystemExit("this kernel rounds for Triton's interpreter: run it without a GPU")
    dtype, k, eps = getattr(torch, SPEC["dtype"]), SPEC["features"], SPEC["eps"]
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    torch.manual_seed(0)
    weight, bias = torch.randn(k).to(dtype), torch.randn(k).to(dtype)
    for m in (1, 5) if device == "cpu" else (1, 64, 4096):
        x, residual = torch.randn(m, k).to(dtype), torch.randn(m, k).to(dtype)
        total = x + residual if SPEC["has_residual"] else x
        xf = total.float()
        if SPEC["kind"] != "rms":
            xf = xf - xf.mean(1, keepdim=True)
        y = xf * torch.rsqrt(xf.square().mean(1, keepdim=True) + eps)
        if SPEC["round_first"]:
            y = y.to(dtype).float()
        if SPEC["has_weight"]:
            y = y * (weight.float() + SPEC["offset"])
        if SPEC["has_bias"]:
            y = y + bias.float()
        y = y.to(dtype).float()
        absmax = y.abs().amax(1)
        want = (y * (absmax.reciprocal() * 127)[:, None]).round()
        xq = torch.empty(m, k, dtype=torch.int8, device=device)
        scale = torch.empty(m, dtype=torch.float32, device=device)
        count = torch.empty(m, dtype=torch.int32, device=device)
        out, normed = (torch.empty(m, k, dtype=dtype, device=device) for _ in range(2))
        x, residual, w, b = (t.to(device) for t in (x, residual, weight, bias))

        def run():
            grid = (triton.cdiv(m, TILE["ROWS"]),)
            norm_quantize_kernel[grid](
                x, k, residual, k, w, b, xq, scale, count, out, normed, m, **options
            )

        run()
        # sums in another order: a value at a border of rounding may fall to the other side
        one = 2 * torch.finfo(dtype).eps + 1e-5
        assert (xq.cpu() - want).abs().max() <= 1, f"m={m}: wrong integers"
        assert (xq.cpu() != want).float().mean() < 0.01, f"m={m}: too many integers differ"
        torch.testing.assert_close(scale.cpu(), absmax / 127, rtol=one, atol=0.0)
        assert torch.equal(count, xq.sum(1, dtype=torch.int32)), f"m={m}: wrong sums"
        if SPEC["has_residual"]:
            assert torch.equal(out.cpu(), total), f"m={m}: wrong residual sums"
        if SPEC["keep"]:
            torch.testing.assert_close(normed.cpu().float(), y, rtol=one, atol=1e-5)
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
        print(f"m={m} k={k} {SPEC['dtype']} {SPEC['kind']}: equal to torch, {took}")
"""

TOLERANCE = 1 / 126
"""By how much two tiles may differ, relative to the largest: one step of 127, see above."""

NORM_QUANTIZE = Family(
    "norm_quantize",
    norm_quantize_kernel,
    bind,
    heuristic,
    candidates,
    SELFCHECK,
    trial,
    tolerance=TOLERANCE,
    pdl=True,
)
