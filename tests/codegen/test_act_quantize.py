"""The fused activation against its definition: exact but for values at a border of rounding.

exp, erf and division end in other bits than torch's. So an activation may differ where the exact
one, taken in fp64, lies within that error of the border between two values of the dtype, and
nowhere else. From the activation on, everything is equal bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.kernels.act_quantize import (
    ACT_QUANTIZE,
    ONE_PASS,
    ActSpec,
    ActTrial,
    candidates,
    heuristic,
    launch,
    spec_of,
)
from qoqc.codegen.tuning.search import wrong
from qoqc.ir.glue import ACTIVATIONS, ActKind, act_quant
from qoqc.quant.activation import quantize_act
from qoqc.runtime.device import DeviceKey, device_key

kinds = pytest.mark.parametrize("kind", get_args(ActKind))
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def data(m: int, k: int, dtype: torch.dtype, gated: bool = True) -> list[torch.Tensor]:
    """gate and up [m, k], halves of one tensor; tokens of very different size."""
    generator = torch.Generator().manual_seed(m * 7919 + k)
    size = torch.logspace(-2, 1.5, m).unsqueeze(1)
    x = (torch.randn(m, 2 * k, generator=generator) * size).to(dtype)
    return [x[:, :k], x[:, k:]] if gated else [x[:, :k]]


def run(parts: list[torch.Tensor], kind: str, device: torch.device) -> list[torch.Tensor]:
    gate, up = (*(part.to(device) for part in parts), None)[:2]
    assert gate is not None
    return [t.cpu() for t in dispatch.act_quant(gate, up, kind)]


def values(parts: list[torch.Tensor], kind: str, device: torch.device) -> torch.Tensor:
    """What the kernel quantizes, in 16 bit: a token of one channel gives it away exactly."""
    xq, scale, _ = run([part.reshape(-1, 1) for part in parts], kind, device)
    value = (scale * 127).to(parts[0].dtype) * xq[:, 0].sign()
    return value.to(parts[0].dtype).view(parts[0].shape)


def interval(parts: list[torch.Tensor], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value that fp32 functions of a few last bits' error can give."""
    gate, dtype = parts[0].double(), parts[0].dtype
    act = ACTIVATIONS[kind](gate)
    # of the value, more for exp of a large number; and of 1 + tanh or 1 + erf near 0
    slack = 2.0**-22 * (4 + gate.abs()) * act.abs() + 2.0**-23 * gate.abs() * (kind != "relu")
    low, high = (act - slack).to(dtype), (act + slack).to(dtype)
    if len(parts) == 1:
        return low, high
    ends = low * parts[1], high * parts[1]
    return torch.minimum(*ends), torch.maximum(*ends)


@kinds
@halves
@pytest.mark.parametrize("gated", [True, False])
def test_the_activation(
    kind: ActKind, dtype: torch.dtype, gated: bool, device: torch.device
) -> None:
    parts = data(16, 64, dtype, gated)
    low, high = interval(parts, kind)
    defined = ACTIVATIONS[kind](parts[0])
    got = values(parts, kind, device)
    for value in (got, defined * parts[1] if gated else defined):
        off = (value < low) | (value > high)
        assert not off.any(), f"{value[off][:4]} not in {low[off][:4]}..{high[off][:4]}"
    narrow = low == high
    assert narrow[: 8 if "gelu" in kind else 16].float().mean() > 0.9


@kinds
@halves
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 5), (5, 128), (2, 1001), (0, 8)])
def test_quantization_is_exact(
    kind: ActKind, dtype: torch.dtype, gated: bool, m: int, k: int, device: torch.device
) -> None:
    parts = data(m, k, dtype, gated)
    got = run(parts, kind, device)
    wanted = quantize_act(values(parts, kind, device))
    for name, a, b in zip(("xq", "scale", "sum"), got, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


@kinds
@pytest.mark.parametrize("k", [100, ONE_PASS + 8])
def test_fp32_differs_at_borders_only(kind: ActKind, k: int, device: torch.device) -> None:
    parts = data(3, k, torch.float32)
    xq, scale, total = run(parts, kind, device)
    exact = ACTIVATIONS[kind](parts[0].double()) * parts[1].double()
    absmax = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), absmax[:, 0] / 127, rtol=1e-5, atol=0.0)
    # the exact quotient rounds to the integer, or lies at a border within the functions' error
    assert (exact * 127 / absmax - xq).abs().max() <= 0.5 + 127 * 1e-5
    assert torch.equal(total, xq.sum(-1, dtype=torch.int32))


@kinds
@pytest.mark.parametrize("k", [33, ONE_PASS + 8])
def test_special_tokens(kind: ActKind, k: int, device: torch.device) -> None:
    gate, up = (part.clone() for part in data(7, k, torch.bfloat16))
    gate[0] = 0
    gate[1, 1] = torch.nan
    up[2, 2] = torch.inf
    gate[3, 2] = torch.inf
    up[4] = 0
    gate[5] = -200.0
    gate[6] = 80.0
    up[3, 2] = 1.0
    xq, scale, total = run([gate, up], kind, device)
    want = act_quant(gate, up, kind)
    assert torch.equal(scale.isnan(), want[1].isnan())
    assert scale[1].isnan() and scale[3].isnan() and not xq[1].any()
    assert scale[0] == scale[4] == 0 and not xq[0].any() and not total[4].any()
    for row in (0, 4, 6):
        assert torch.equal(xq[row], want[0][row])


def test_leading_axes_and_strides(device: torch.device) -> None:
    x = data(6, 96, torch.bfloat16)[0]
    for part in (x[:, :40], x[::2], x.t(), x[:1].expand(3, 96), x.view(2, 3, 96)):
        for a, b in zip(
            run([part, part], "silu", device),
            run([part.contiguous(), part.contiguous()], "silu", device),
            strict=True,
        ):
            assert a.shape[: part.dim() - 1] == part.shape[:-1]
            assert torch.equal(a, b)


@pytest.mark.parametrize("k", [40, ONE_PASS + 8])
def test_candidates_agree(k: int, device: torch.device) -> None:
    # with relu nothing is rounded but the product: all must give the definition's bits
    parts = data(5, k, torch.bfloat16)
    spec, key = ActSpec(k, torch.bfloat16, "relu"), device_key(device)
    tiles = candidates(spec, 16, key)
    assert heuristic(spec, 16, key) in tiles
    want = act_quant(parts[0], parts[1], "relu")
    for tile in tiles if device.type == "cuda" else tiles[::4]:
        got = launch(build(ACT_QUANTIZE, spec, tile), *(part.to(device) for part in parts))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.cpu(), b), tile


def test_the_tuner_tells_right_from_wrong(device: torch.device) -> None:
    spec = ActSpec(72, torch.bfloat16)
    tile = heuristic(spec, 4, device_key(device))
    assert wrong((ACT_QUANTIZE, tile), spec, 4, device) is None

    class Relu(ActTrial):
        def expected(self) -> tuple[torch.Tensor, ...]:
            gate, up = self._halves(self._inputs[0])
            return act_quant(gate, up, "relu")

    form = dataclasses.replace(ACT_QUANTIZE, trial=Relu)
    assert wrong((form, tile), spec, 4, device) == "it gives other results"


def test_trial_copies_are_equal(device: torch.device) -> None:
    spec = ActSpec(72, torch.bfloat16)
    trial = ActTrial(spec, 3, device)
    trial.rotate(3)
    kernel = build(ACT_QUANTIZE, spec, heuristic(spec, 4, device_key(device)))
    first = [t.clone() for t in trial(kernel)]
    trial.clear()
    for a, b in zip(first, trial(kernel, 2), strict=True):
        assert torch.equal(a, b)
    assert trial.cold_bytes == 2 * 3 * 72 * 2


@pytest.mark.parametrize("k", [1, 128, 14336, ONE_PASS, ONE_PASS + 1, 100000])
@pytest.mark.parametrize("size", [1, 64, 8192])
def test_heuristic_is_legal(k: int, size: int) -> None:
    spec, device = ActSpec(k, torch.bfloat16), DeviceKey("A", 80, 108, 163 * 1024)
    for tile in (heuristic(spec, size, device), *candidates(spec, size, device)):
        assert tile["BLOCK_K"] >= k or tile["LOOP"]
        assert tile["BLOCK_K"] * tile["ROWS"] <= 64 * 32 * tile.num_warps


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("gate", "up", "kind", "message"),
    [
        (X.double(), None, "silu", "gate must be bfloat16, .* got torch.float64"),
        (X[:, :0], None, "silu", "at least one channel"),
        (X, None, "mish", "kind 'mish' is not one of silu, gelu, gelu_tanh, relu"),
        (X, X[:1], "silu", r"up must be .* \(2, 8\) as gate is, got .* \(1, 8\)"),
        (X, X.half(), "silu", "got torch.float16"),
    ],
)
def test_refused(gate: torch.Tensor, up: torch.Tensor | None, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"act_quant: .*{message}|act_quant: {message}"):
        spec_of(gate, up, kind)


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("k", [127, 4096, 11008, 14336, 28672])
@pytest.mark.parametrize("m", [1, 17, 300])
def test_large(kind: ActKind, m: int, k: int, device: torch.device) -> None:
    parts = data(m, k, torch.bfloat16)
    low, high = interval(parts, kind)
    got = values(parts, kind, device)
    assert not ((got < low) | (got > high)).any()
    for a, b in zip(run(parts, kind, device), quantize_act(got), strict=True):
        assert torch.equal(a, b)
