"""The reference of the linear against loops and formulas written independently of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from qoqc.ir import reference
from qoqc.quant.activation import quantize_act
from qoqc.quant.weight import expand_int8, quantize_weight

SETTINGS = settings(deadline=None, max_examples=20)
both_bits = pytest.mark.parametrize("bits", [4, 8])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


# the integer GEMM


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 300, 130), (17, 33, 1025), (64, 8, 4096)])
@pytest.mark.parametrize("x", [127, -127, None])
@pytest.mark.parametrize("w", [127, -128, None])
def test_integer_matmul_is_exact(m: int, n: int, k: int, x: int | None, w: int | None) -> None:
    xq = int8(m, k) if x is None else torch.full((m, k), x, dtype=torch.int8)
    w8 = int8(n, k, seed=1) if w is None else torch.full((n, k), w, dtype=torch.int8)
    want = (xq.double() @ w8.double().t()).int()
    for matmul in (reference.integer_matmul, reference.chunked_matmul):
        got = matmul(xq, w8)
        assert got.dtype == torch.int32
        assert torch.equal(got, want)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 8), (3, 0, 8), (3, 4, 0), (0, 0, 0)])
def test_integer_matmul_of_nothing(m: int, n: int, k: int) -> None:
    got = reference.integer_matmul(int8(m, k), int8(n, k))
    assert (got.shape, got.dtype) == ((m, n), torch.int32)
    assert not got.any()


def test_chunks_stay_within_fp32_integers() -> None:
    assert reference.EXACT_K * 127 * 128 <= 2**24


def test_a_cpu_without_vnni_takes_the_chunked_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "int8_gemm_is_usable", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)  # a call would fail
    xq, w8 = int8(3, 2000), int8(5, 2000, seed=1)
    assert torch.equal(reference.integer_matmul(xq, w8), (xq.double() @ w8.double().t()).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_int8_linear_is_the_documented_epilogue(
    dtype: torch.dtype, has_bias: bool, has_residual: bool
) -> None:
    xq, w8 = int8(2, 3, 100), int8(7, 100, seed=1)
    token_scale, channel_scale = randn(2, 3).abs(), randn(7).abs()
    bias = randn(7).to(dtype) if has_bias else None
    residual = randn(2, 3, 7).to(dtype) if has_residual else None
    got = reference.int8_linear(xq, token_scale, w8, channel_scale, bias, residual, dtype)
    acc = torch.einsum("abk,nk->abn", xq.long(), w8.long()).float()
    want = acc * channel_scale * token_scale[..., None]
    want = want if bias is None else want + bias.float()
    want = want if residual is None else want + residual.float()
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0), (2, 3, 0), (16,)])
def test_int8_linear_of_empty_and_flat_inputs(shape: tuple[int, ...]) -> None:
    xq, w8 = int8(*shape), int8(5, shape[-1])
    scale = torch.ones(shape[:-1])
    bias = torch.arange(5.0)
    y = reference.int8_linear(xq, scale, w8, torch.ones(5), bias, None, torch.float32)
    assert y.shape == (*shape[:-1], 5)
    if shape[-1] == 0:
        assert torch.equal(y, bias.expand(y.shape))


def test_int8_linear_leaves_its_inputs_alone() -> None:
    bias, residual = randn(5), randn(3, 5)
    before = bias.clone(), residual.clone()
    reference.int8_linear(
        int8(3, 8), torch.ones(3), int8(5, 8), torch.ones(5), bias, residual, torch.float32
    )
    assert torch.equal(bias, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("group_size", [128, -1])
def test_a_bad_token_makes_its_own_row_nan_only(group_size: int) -> None:
    packed = quantize_weight(randn(6, 200), 128 if group_size == 128 else -1)
    x = randn(3, 200)
    x[1, 4] = float("inf")
    xq, scale, _ = quantize_act(x)
    y = reference.int8_linear(
        xq, scale, expand_int8(packed), packed.channel_scale, None, None, torch.float32
    )
    assert y.isnan().all(-1).tolist() == [False, True, False]
    assert not y[[0, 2]].isnan().any()


def test_zero_point_folds_out_with_the_token_sum() -> None:
    packed = quantize_weight(randn(40, 200) + 0.3, -1)
    assert packed.channel_zero is not None
    xq, _, total = quantize_act(randn(5, 200))
    w8 = expand_int8(packed).long()
    codes = w8 + packed.channel_zero[:, None]
    folded = xq.long() @ codes.t() - total.long()[:, None] * packed.channel_zero
    assert torch.equal(folded, xq.long() @ w8.t())


# a cache to append to
