"""Activation function, product and per-token int8 quantization: one program per few tokens.

gate [M, K] 16 or 32 bit (and up [M, K]), rows some stride apart: halves of one tensor need no
copy -> xq int8 [M, K], token_scale fp32 [M], token_sum int32 [M]. As ir/glue.act_quant; exp, erf
and a division differ from torch's in their last bits, so the activation may come out one step of
its dtype away where it lies at a border of rounding. What follows it is equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qoqc.codegen.facts import by_facts
from qoqc.codegen.family import Family, Launch, Tile, TwinTrial
from qoqc.codegen.kernels import token_tiles
from qoqc.codegen.kernels.pieces import check_device, rounded
from qoqc.codegen.kernels.quantize import (
    INFINITY_BITS,
    live_absmax,
    magnitude_bits,
    quantize_block,
)
from qoqc.codegen.kernels.token_rows import empty_quantized, rows_of
from qoqc.ir.glue import ACTIVATIONS, ActKind, act_quant
from qoqc.ir.spec import OUTPUT_DTYPES
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

ONE_PASS = 16384
"""The longest token that is kept in registers: 32 fp32 values per thread at 16 warps."""

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""xq, token_scale, token_sum."""

SQRT_HALF = tl.constexpr(0.7071067811865476)
GELU_SLOPE = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)


@dataclasses.dataclass(frozen=True)
class ActSpec:
    """activation(gate), times `up` if `gated`, of tokens of `features` values of `dtype`."""

    features: int
    dtype: torch.dtype
    kind: ActKind = "silu"
    gated: bool = True


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation function of fp32 `x`."""
    if ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        y = x * 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), which loses no digits where tanh is near -1
        y = x / (1.0 + tl.exp(-GELU_SLOPE * (x + GELU_CUBE * (x * x * x))))
    else:
        tl.static_assert(ACT == "relu", "an activation of ir/glue.ACTIVATIONS")
        y = tl.where(x < 0, 0.0, x)
    return y


@triton.jit
def load_product(
    gate_rows,  # [ROWS, 1] pointers
    up_rows,
    offs_k,
    inside,
    ACT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """activation(gate) * up, fp32 values of KIND [ROWS, BLOCK_K]; 0 outside."""
    gate = tl.load(gate_rows + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
    y = rounded(activate(gate, ACT), KIND, ROUND_BF16)
    if GATED:
        up = tl.load(up_rows + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
        y = rounded(y * up, KIND, ROUND_BF16)
    return y


@triton.jit(do_not_specialize=["M"])
def act_quantize_kernel(
    gate_ptr,  # [M, K]
    gate_stride_m,
    up_ptr,  # [M, K], read if GATED
    up_stride_m,
    xq_ptr,  # [M, K] int8
    scale_ptr,  # [M] fp32
    sum_ptr,  # [M] int32
    M,
    K: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOOP: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Activate and quantize the tokens pid * ROWS + 0..ROWS-1."""
    if DEPENDENT:
        # the weights of the GEMM that comes next may be on their way before this one's input is
        gdc_launch_dependents()
        gdc_wait()
    kind: tl.constexpr = gate_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = offs_m < M
    offs_k = tl.arange(0, BLOCK_K)
    gate_rows = gate_ptr + (offs_m * gate_stride_m)[:, None]
    up_rows = up_ptr + (offs_m * up_stride_m)[:, None]
    xq_rows = xq_ptr + (offs_m * K)[:, None]
    if LOOP:
        tops = tl.zeros((ROWS, BLOCK_K), dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            offs = start + offs_k
            inside = in_m[:, None] & (offs < K)[None, :]
            y = load_product(gate_rows, up_rows, offs, inside, ACT, kind, GATED, ROUND_BF16)
            tops = tl.maximum(tops, magnitude_bits(y))
        top = tl.max(tops, axis=1)
        sums = tl.zeros((ROWS, BLOCK_K), dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            offs = start + offs_k
            inside = in_m[:, None] & (offs < K)[None, :]
            y = load_product(gate_rows, up_rows, offs, inside, ACT, kind, GATED, ROUND_BF16)
            q = quantize_block(y, top)
            sums += q
            tl.store(xq_rows + offs[None, :], q.to(tl.int8), mask=inside)
        total = tl.sum(sums, axis=1)
    else:
        inside = in_m[:, None] & (offs_k < K)[None, :]
        y = load_product(gate_rows, up_rows, offs_k, inside, ACT, kind, GATED, ROUND_BF16)
        top = tl.max(magnitude_bits(y), axis=1)
        q = quantize_block(y, top)
        tl.store(xq_rows + offs_k[None, :], q.to(tl.int8), mask=inside)
        total = tl.sum(q, axis=1)
    scale = tl.where(top < INFINITY_BITS, tl.div_rn(live_absmax(top), 127.0), float("nan"))
    tl.store(scale_ptr + offs_m, scale, mask=in_m)
    tl.store(sum_ptr + offs_m, total, mask=in_m)


def launch(kernel: Launch, gate: torch.Tensor, up: torch.Tensor | None) -> Outputs:
    """The outputs of qoqc::act_quant for tensors that `spec_of` accepts."""
    outputs = empty_quantized(gate)
    start(kernel, gate, up, outputs)
    return outputs


def start(kernel: Launch, gate: torch.Tensor, up: torch.Tensor | None, outputs: Outputs) -> None:
    """Launch; rows whose channels are not neighbours are copied first."""
    tokens = outputs[1].numel()
    if not tokens:
        return
    gate, stride = rows_of(gate)
    up, up_stride = (gate, stride) if up is None else rows_of(up)
    grid = (ceil_div(tokens, kernel.tile["ROWS"]),)
    kernel(grid, gate, stride, up, up_stride, *outputs, tokens)


@by_facts
def spec_of(gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> ActSpec:
    """The spec of a call; ValueError for what the kernel does not take."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"act_quant: kind {kind!r} is not one of {', '.join(ACTIVATIONS)}")
    if gate.dtype not in OUTPUT_DTYPES or gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(
            f"act_quant: gate must be bfloat16, float16 or float32 with at least one channel, "
            f"got {gate.dtype} {tuple(gate.shape)}"
        )
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise ValueError(
            f"act_quant: up must be {gate.dtype} {tuple(gate.shape)} as gate is, "
            f"got {up.dtype} {tuple(up.shape)}"
        )
    check_device("act_quant", gate=gate, up=up)
    return ActSpec(gate.shape[-1], gate.dtype, cast("ActKind", kind), up is not None)


def bind(spec: ActSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `act_quantize_kernel`."""
    gated = int(spec.gated)
    return {"K": spec.features, "ACT": spec.kind, "GATED": gated, **dict(tile.constexprs)}


def heuristic(spec: ActSpec, size: int, device: DeviceKey) -> Tile:
    """Whole tokens in registers."""
    return token_tiles.heuristic(spec.features, spec.dtype, size, device, ONE_PASS)


def candidates(spec: ActSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Tokens per program times warps."""
    return token_tiles.candidates(spec.features, spec.dtype, size, device, ONE_PASS)


class ActTrial(TwinTrial):
    """`size` random tokens; gate and up are halves of one tensor, as a merged linear gives them."""

    def __init__(self, spec: ActSpec, size: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        width = spec.features * (2 if spec.gated else 1)
        x = torch.randn(size, width, generator=generator, device=device).to(spec.dtype)
        self._spec = spec
        self._inputs = [x]
        self._outputs = empty_quantized(x[:, : spec.features])

    def __call__(self, kernel: Launch, copy: int = 0) -> Outputs:
        """The outputs; the next call overwrites them."""
        start(kernel, *self._halves(self._inputs[copy]), self._outputs)
        return self._outputs

    def clear(self) -> None:
        """Fill the outputs with what no token gives."""
        for output in self._outputs:
            output.fill_(-128)

    @property
    def cold_bytes(self) -> int:
        """Bytes of the tokens: what a long prompt finds in memory, not in L2."""
        return self._inputs[0].numel() * self._inputs[0].element_size()

    def rotate(self, copies: int) -> None:
        """Have `copies` equal batches of tokens in different memory."""
        while len(self._inputs) < copies:
            self._inputs.append(self._inputs[0].clone())

    def expected(self) -> tuple[torch.Tensor, ...]:
        """The definition."""
        return act_quant(*self._halves(self._inputs[0]), self._spec.kind)

    def sample(self, result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """All rows."""
        return result

    def _halves(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = self._spec.features
        return x[:, :features], x[:, features:] if self._spec.gated else None


SELFCHECK = """
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if TILE["ROUND_BF16"] and device == "cuda":
        raise SystemExit("this kernel rounds for Triton's interpreter: run it without a GPU")
    dtype, k = getattr(torch, SPEC["dtype"]), SPEC["features"]
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    functional = torch.nn.functional
    torch.manual_seed(0)
    act = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
    }[SPEC["kind"]]
    for m in (1, 5) if device == "cpu" else (1, 64, 4096):
        x = torch.randn(m, 2 * k).to(dtype)
        gate, up = x[:, :k], x[:, k:]
        y = (act(gate) * up if SPEC["gated"] else act(gate)).float()
        absmax = y.abs().amax(1)
        want = (y * (absmax.reciprocal() * 127)[:, None]).round()
        x = x.to(device)
        xq = torch.empty(m, k, dtype=torch.int8, device=device)
        scale = torch.empty(m, dtype=torch.float32, device=device)
        total = torch.empty(m, dtype=torch.int32, device=device)

        def run():
            grid = (triton.cdiv(m, TILE["ROWS"]),)
            gate, up = x[:, :k], x[:, k:]
            act_quantize_kernel[grid](gate, 2 * k, up, 2 * k, xq, scale, total, m, **options)

        run()
        # exp ends in other bits: a value at a border of rounding may fall to the other side
        one = 2 * torch.finfo(dtype).eps + 1e-5
        assert (xq.cpu() - want).abs().max() <= 1, f"m={m}: wrong integers"
        assert (xq.cpu() != want).float().mean() < 0.01, f"m={m}: too many integers differ"
        torch.testing.assert_close(scale.cpu(), absmax / 127, rtol=one, atol=0.0)
        assert torch.equal(total, xq.sum(1, dtype=torch.int32)), f"m={m}: wrong sums"
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
        print(f"m={m} k={k} {SPEC['dtype']} {SPEC['kind']}: equal to torch, {took}")
"""

TOLERANCE = 1 / 126
"""By how much two tiles may differ, relative to the largest: one step of 127, see above."""

ACT_QUANTIZE = Family(
    "act_quantize",
    act_quantize_kernel,
    bind,
    heuristic,
    candidates,
    SELFCHECK,
    ActTrial,
    tolerance=TOLERANCE,
    pdl=True,
)
