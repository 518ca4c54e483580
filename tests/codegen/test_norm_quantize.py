"""The fused norm against its definition: exact but for values at a border of rounding.

The kernel sums over channels in another order than torch. So a normalized value may differ where
the exact one, taken in fp64, lies within the error of such sums of the border between two values
of the dtype, and nowhere else. From the normalized value on, everything is equal bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.kernels.norm_call import NormSpec, NormTrial, call_of, random_call
from qoqc.codegen.kernels.norm_quantize import (
    NORM_QUANTIZE,
    ONE_PASS,
    candidates,
    heuristic,
    launch,
    start,
)
from qoqc.codegen.tuning.search import wrong
from qoqc.ir import glue, ops
from qoqc.ir.spec import OUTPUT_DTYPES
from qoqc.passes import manager
from qoqc.quant.activation import quantize_act
from qoqc.runtime.device import DeviceKey, device_key
from qoqc.testing import capture, context, run_graph, sqnr, tiny_model

A100 = DeviceKey("A100", 80, 108, 163 * 1024)
H200 = DeviceKey("H200", 90, 132, 227 * 1024)

SUMS = 2.0**-20
"""Relative error of fp32 sums of some thousand numbers in any order: seen 2**-22, and room."""

LLAMA = NormSpec(0, torch.bfloat16, round_first=True, has_residual=True)
FORMS = {
    "llama": LLAMA,
    "gemma": NormSpec(0, torch.bfloat16, offset=1.0, has_residual=True),
    "olmo": NormSpec(0, torch.bfloat16),
    "cohere": NormSpec(0, torch.bfloat16, "centred", 1e-5, has_residual=True),
    "layer": NormSpec(0, torch.bfloat16, "layer", 1e-5, has_residual=True, has_bias=True),
    "bare": NormSpec(0, torch.bfloat16, "layer", 1e-5, has_weight=False),
    "unweighted": NormSpec(0, torch.bfloat16, has_weight=False),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def arguments(spec: NormSpec, x: torch.Tensor) -> tuple[Any, ...]:
    """The arguments of the op for tokens `x`."""
    generator = torch.Generator().manual_seed(x.numel())

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(spec.dtype)

    return (
        x.to(spec.dtype),
        randn(*x.shape) if spec.has_residual else None,
        randn(x.shape[-1]) if spec.has_weight else None,
        randn(x.shape[-1]) if spec.has_bias else None,
        spec.kind,
        spec.eps,
        spec.offset,
        spec.round_first,
        True,
    )


def interval(spec: NormSpec, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest normalized value that fp32 sums in some order can give."""
    x, residual, weight, bias, *_ = args
    total = (x if residual is None else x + residual).double()
    mean = total.mean(-1, keepdim=True) if spec.kind != "rms" else torch.zeros(())
    centred = total - mean
    root = (centred.square().mean(-1, keepdim=True) + spec.eps).rsqrt()
    slack = SUMS * centred.abs() * root
    if spec.kind != "rms":
        shift = SUMS * (total.abs() + mean.abs()).amax(-1, keepdim=True) * root
        slack = slack + shift + shift * centred.abs() * root
    low, high = centred * root - slack, centred * root + slack
    exact = spec.round_first and spec.dtype is not torch.float32
    if exact:  # a product of two rounded 16-bit numbers is exact in fp32
        low, high = low.to(spec.dtype).double(), high.to(spec.dtype).double()
    if weight is not None:
        factor = weight.double() + spec.offset
        low, high = (
            torch.minimum(low * factor, high * factor),
            torch.maximum(low * factor, high * factor),
        )
    size = torch.maximum(low.abs(), high.abs())
    if bias is not None:
        low, high, size = low + bias, high + bias, size + bias.abs()
    last = 0.0 if exact and bias is None else size * 2.0**-22
    return (low - last).to(spec.dtype), (high + last).to(spec.dtype)


def assert_as_defined(spec: NormSpec, args: tuple[Any, ...], device: torch.device) -> None:
    """All five outputs of the kernel, and of it without the optional one."""
    on_device = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    got = [t.cpu() for t in dispatch.norm_quant(*on_device)]
    want = glue.norm_quant(*args)
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.is_contiguous()
    xq, scale, total, new_residual, normed = got
    assert torch.equal(new_residual, want[3])
    low, high = interval(spec, args)
    finite = low.isfinite() & high.isfinite()
    for name, value in (("kernel", normed), ("definition", want[4])):
        off = finite & ((value < low) | (value > high))
        assert not off.any(), f"{name}: {value[off][:4]} not in {low[off][:4]}..{high[off][:4]}"
    for name, a, b in zip(("xq", "scale", "sum"), got, quantize_act(normed), strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
    shorter = dispatch.norm_quant(*on_device[:-1], False)
    assert shorter[4].numel() == 0
    for a, b in zip(shorter[:4], got[:4], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
    # one step of xq at most, unless a token of equal channels leaves nothing but the error
    top = torch.maximum(low.abs(), high.abs()).float().amax(-1, keepdim=True)
    settled = (high - low).float().amax(-1, keepdim=True) <= top / 100
    assert (((xq.int() - want[0].int()).abs() <= 1) | ~settled).all()
    assert torch.equal(scale.isnan(), want[1].isnan())


def tokens(m: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m * 7919 + k)
    return torch.randn(m, k, generator=generator) * torch.logspace(-3, 3, m).unsqueeze(1)


@forms
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 5), (5, 128), (2, 4095), (0, 8)])
def test_shapes(form: NormSpec, dtype: torch.dtype, m: int, k: int, device: torch.device) -> None:
    spec = dataclasses.replace(form, dtype=dtype)
    assert_as_defined(spec, arguments(spec, tokens(m, k)), device)


@forms
@pytest.mark.slow
@pytest.mark.parametrize("k", [ONE_PASS + 1, 12288])
def test_a_token_longer_than_the_registers(form: NormSpec, k: int, device: torch.device) -> None:
    assert_as_defined(form, arguments(form, tokens(2, k)), device)


def test_the_interval_is_narrow() -> None:
    """Most values have one admissible result: the tests above compare them bit for bit."""
    for form in FORMS.values():
        low, high = interval(form, arguments(form, tokens(8, 1024)))
        assert (low == high).float().mean() > 0.98


@forms
@pytest.mark.parametrize("k", [33, pytest.param(ONE_PASS + 8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_special_tokens(form: NormSpec, k: int, eps: float, device: torch.device) -> None:
    spec = dataclasses.replace(form, has_residual=False, eps=eps)
    x = tokens(9, k)
    x[0] = 0
    x[1, 1] = torch.nan
    x[2, 2] = torch.inf
    x[3, 2:4] = torch.tensor([torch.inf, -torch.inf])
    x[4] = 3.0
    x[5] = 1e-30 if eps else 1.0  # without eps its square is 0 in fp32 and not in fp64
    x[6, 1:] = 0
    args = arguments(spec, x)
    assert_as_defined(spec, args, device)
    xq, scale, total, _, _ = dispatch.norm_quant(
        *[a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    )
    assert scale[1].isnan() and not xq[1].any() and not total[1].any()
    if eps and spec.kind == "rms":
        assert scale[0] == 0 and not xq[0].any()


@pytest.mark.parametrize("shape", [(6,), (2, 3, 40), (0, 4, 8)])
def test_leading_axes(shape: tuple[int, ...], device: torch.device) -> None:
    assert_as_defined(LLAMA, arguments(LLAMA, torch.randn(shape)), device)


def test_strides(device: torch.device) -> None:
    wide = tokens(6, 96).bfloat16()
    for x in (wide[:, 8:48], wide[::2], wide.t(), wide[:1].expand(3, 96)):
        args = list(arguments(LLAMA, x))
        args[0] = x
        on_device = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        for got, want in zip(
            dispatch.norm_quant(*on_device),
            dispatch.norm_quant(x.contiguous().to(device), *on_device[1:]),
            strict=True,
        ):
            assert torch.equal(got, want)


@forms
@pytest.mark.parametrize("k", [40, ONE_PASS + 8])
def test_candidates_agree(form: NormSpec, k: int, device: torch.device) -> None:
    spec = dataclasses.replace(form, features=k, keep=True)
    call, key = random_call(spec, 5, device), device_key(device)
    tiles = candidates(spec, 16, key)
    assert heuristic(spec, 16, key) in tiles
    host = [None if t is None else t.cpu() for t in (call.x, call.residual, call.weight, call.bias)]
    low, high = interval(spec, tuple(host))
    pairs = heuristic(spec, 128, key)
    for tile in (*tiles, pairs) if device.type == "cuda" else tiles[::5]:
        got = [t.cpu() for t in launch(build(NORM_QUANTIZE, spec, tile), call)]
        assert ((low <= got[4]) & (got[4] <= high)).all(), tile
        for a, b in zip(got, quantize_act(got[4]), strict=False):
            assert torch.equal(a, b), tile


def test_the_tuner_tells_right_from_wrong(device: torch.device) -> None:
    spec = dataclasses.replace(LLAMA, features=72)
    tile = heuristic(spec, 4, device_key(device))
    assert wrong((NORM_QUANTIZE, tile), spec, 4, device) is None

    def without_residual(kernel, call, outputs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        start(kernel, dataclasses.replace(call, residual=torch.zeros_like(call.x)), outputs)

    form = dataclasses.replace(NORM_QUANTIZE, trial=lambda *a: NormTrial(without_residual, *a))
    assert wrong((form, tile), spec, 4, device) == "it gives other results"


def test_trial_copies_are_equal(device: torch.device) -> None:
    spec = dataclasses.replace(LLAMA, features=72)
    trial = NormTrial(start, spec, 3, device)
    trial.rotate(3)
    kernel = build(NORM_QUANTIZE, spec, heuristic(spec, 4, device_key(device)))
    first = [t.clone() for t in trial(kernel)]
    trial.clear()
    for a, b in zip(first, trial(kernel, 2), strict=True):
        assert torch.equal(a, b)
    assert trial.cold_bytes == 2 * 3 * 72 * 2


@pytest.mark.parametrize("k", [1, 128, 4096, 8192, 8193, 100000])
@pytest.mark.parametrize("size", [1, 64, 128, 8192])
@pytest.mark.parametrize("device", [A100, H200], ids=lambda key: key.name)
def test_heuristic_is_legal(k: int, size: int, device: DeviceKey) -> None:
    spec = NormSpec(k, torch.bfloat16)
    for tile in (heuristic(spec, size, device), *candidates(spec, size, device)):
        block, rows = tile["BLOCK_K"], tile["ROWS"]
        assert block >= k or tile["LOOP"]
        assert block & (block - 1) == rows & (rows - 1) == 0
        assert block * rows <= 64 * 32 * tile.num_warps
        assert tile.num_warps in (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    ("k", "size", "key", "rows", "num_warps"),
    [
        (4096, 64, H200, 1, 8),
        (4096, 128, H200, 2, 16),
        (4096, 256, H200, 2, 16),
        (4096, 512, H200, 1, 8),
        (4096, 128, A100, 1, 8),
        (8192, 128, H200, 1, 16),
        (1000, 128, H200, 2, 4),
    ],
)
def test_tokens_come_in_pairs_where_every_sm_would_have_one(
    k: int, size: int, key: DeviceKey, rows: int, num_warps: int
) -> None:
    tile = heuristic(NormSpec(k, torch.bfloat16), size, key)
    assert (tile["ROWS"], tile.num_warps) == (rows, num_warps)


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.double(), None, None, None, "rms"), "x must be bfloat16, .* got torch.float64"),
        ((X[:, :0], None, None, None, "rms"), ".* at least one channel"),
        ((X, None, None, None, "batch"), "kind 'batch' is not one of rms, centred, layer"),
        ((X, X[:1], None, None, "rms"), r"residual must be .* \(2, 8\) as x is, got .* \(1, 8\)"),
        ((X, None, X[0].half(), None, "rms"), "weight must be torch.float32 .* torch.float16"),
        ((X, None, None, X[0], "rms"), "a bias goes with kind 'layer', not 'rms'"),
    ],
)
def test_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"norm_quant: {message}"):
        call_of(*args, 1e-6, 0.0, False, False)


def test_a_layer_norm_rounds_once() -> None:
    for offset, round_first in ((1.0, False), (0.0, True)):
        with pytest.raises(ValueError, match="no round_first and no offset"):
            call_of(X, None, None, None, "layer", 1e-6, offset, round_first, False)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_graph_runs_on_the_kernels(family: str, device: torch.device) -> None:
    """What the passes write is what the kernels take: a model's logits stay where they were."""
    model = tiny_model(family, torch.bfloat16)
    gm, inputs = capture(model, torch.arange(3, 9)[None], use_cache=False)
    ctx = context(gm, inputs)
    manager.run(gm, ctx)
    defined = run_graph(gm, ctx)[0]
    swapped = 0
    for node in gm.graph.nodes:
        for name in ("norm_quant", "act_quant"):
            if node.target is getattr(ops, name):
                node.target = _on(device, getattr(dispatch, name))
                swapped += 1
    # silu(gate) * up is a GEMM's affair where that can end in it
    fused = sum(node.target is ops.w4a8_glu for node in gm.graph.nodes)
    assert swapped + fused == 6
    assert sqnr(defined, run_graph(gm, ctx)[0]) > 35  # 16-bit rounding alone is some 45 dB


def _on(device: torch.device, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel for tensors on the CPU."""

    def run(*args: Any) -> tuple[torch.Tensor, ...]:
        moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        return tuple(t.cpu() for t in kernel(*moved))

    return run


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("k", [127, 1000, 4096, 5120, 8192, 16384])
@pytest.mark.parametrize("m", [1, 17, 515])
def test_large(form: NormSpec, m: int, k: int, device: torch.device) -> None:
    assert_as_defined(form, arguments(form, tokens(m, k)), device)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    spec = NormSpec(14336, torch.bfloat16)
    x = torch.zeros(160_000, 14336, dtype=torch.bfloat16, device=device)  # 2.3e9 values
    x[-1] = torch.linspace(-1, 1, 14336)
    weight = torch.ones(14336, dtype=torch.bfloat16, device=device)
    rest = (weight, None, "rms", spec.eps, 0.0, False, False)
    xq, scale, total, _, _ = dispatch.norm_quant(x, None, *rest)
    for got, want in zip(
        (xq, scale, total), dispatch.norm_quant(x[-1:].clone(), None, *rest)[:3], strict=True
    ):
        assert torch.equal(got[-1:], want)
    assert not xq[:-1].any()
