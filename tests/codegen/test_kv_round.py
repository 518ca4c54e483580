"""Rounding to the cache's grid gives the bits of its definition."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.kernels.kv_round import KV_ROUND, RoundSpec, candidates, launch
from qoqc.ir.spec import OUTPUT_DTYPES
from qoqc.quant.kv import fake_quantize_kv
from qoqc.runtime.device import device_key

Bits = Literal[4, 8]


def vectors(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random vectors of sizes 1e-4 to 1e4."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = 10 ** (torch.rand(*shape[:-1], 1, generator=generator) * 8 - 4)
    return (torch.randn(*shape, generator=generator) * size).to(dtype)


def assert_equal_to_twin(x: torch.Tensor, bits: Bits, device: torch.device) -> None:
    got = dispatch.kv4_round(x.to(device), bits)
    want = fake_quantize_kv(x, bits)
    assert got.is_contiguous() and got.dtype == x.dtype
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [1, 16, 80, 128, 192])
def test_equal_to_the_definition(
    dim: int, bits: Bits, dtype: torch.dtype, device: torch.device
) -> None:
    assert_equal_to_twin(vectors(2, 3, 19, dim, dtype=dtype), bits, device)


@pytest.mark.parametrize("bits", [4, 8])
def test_views_and_other_numbers_of_axes(bits: Bits, device: torch.device) -> None:
    x = vectors(2, 19, 3, 64)
    assert_equal_to_twin(x.transpose(1, 2), bits, device)
    assert_equal_to_twin(x[:, ::2], bits, device)
    assert_equal_to_twin(x[..., ::2], bits, device)
    assert_equal_to_twin(x[0, 0], bits, device)
    assert_equal_to_twin(x[0, 0, 0], bits, device)


@pytest.mark.parametrize("shape", [(0, 3, 5, 64), (2, 3, 0, 64), (0, 64)])
def test_nothing_to_round(shape: tuple[int, ...], device: torch.device) -> None:
    assert dispatch.kv4_round(torch.empty(shape, device=device), 4).shape == shape


@pytest.mark.parametrize("bits", [4, 8])
def test_special_values(bits: Bits, device: torch.device) -> None:
    x = vectors(1, 1, 8, 32, dtype=torch.float32)
    x[0, 0, 0] = 0
    x[0, 0, 1] = 3.3
    x[0, 0, 2, 5] = torch.nan
    x[0, 0, 3, 5] = torch.inf
    x[0, 0, 4, 5] = -torch.inf
    x[0, 0, 5] = 1e6
    x[0, 0, 6] = 1e-9
    assert_equal_to_twin(x, bits, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_tiles_agree(dtype: torch.dtype, device: torch.device) -> None:
    x = vectors(1, 2, 70, 96, dtype=dtype)
    spec, want = RoundSpec(96, 4, dtype), fake_quantize_kv(x, 4)
    for tile in candidates(spec, 70, device_key(device)):
        assert torch.equal(launch(build(KV_ROUND, spec, tile), x.to(device)).cpu(), want), tile


def test_what_it_does_not_take(device: torch.device) -> None:
    for x in (torch.zeros(4, 8, dtype=torch.int32), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="kv4_round: x must be"):
            dispatch.kv4_round(x.to(device), 4)
    with pytest.raises(ValueError, match="and 5"):
        dispatch.kv4_round(torch.zeros(4, 8, device=device), 5)
