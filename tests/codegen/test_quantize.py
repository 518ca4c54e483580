from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build, generate
from qoqc.codegen.kernels.quantize import (
    ONE_PASS,
    QUANTIZE,
    QuantizeSpec,
    candidates,
    heuristic,
    launch,
)
from qoqc.ir.spec import OUTPUT_DTYPES
from qoqc.quant.activation import TINY_TOKEN, quantize_act
from qoqc.runtime.device import DeviceKey, device_key

Maker = Callable[[int, int], torch.Tensor]

A100 = DeviceKey("A100", 80, 108, 163 * 1024)
H200 = DeviceKey("H200", 90, 132, 227 * 1024)


def assert_equal_to_twin(x: torch.Tensor, device: torch.device) -> None:
    """The kernel gives the bits of the definition, taken on the CPU."""
    got = dispatch.quantize_act(x.to(device))
    for name, a, b in zip(("xq", "scale", "sum"), got, quantize_act(x.cpu()), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, device.type), name
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True, msg=name)


def tokens(m: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m * 7919 + k)
    size = torch.logspace(-3, 3, m).unsqueeze(1)
    return torch.randn(m, k, generator=generator) * size


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize(
    ("m", "k"), [(1, 1), (3, 5), (7, 128), (2, 300), (5, 4096), (2, ONE_PASS + 1), (0, 8), (3, 0)]
)
def test_shapes(m: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_equal_to_twin(tokens(m, k).to(dtype), device)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 40), (0, 4, 8), (2, 0)])
def test_leading_axes(shape: tuple[int, ...], device: torch.device) -> None:
    assert_equal_to_twin(torch.randn(shape), device)


@pytest.mark.parametrize("k", [33, ONE_PASS + 8])
def test_special_tokens(k: int, device: torch.device) -> None:
    x = tokens(14, k)
    x[0] = 0
    x[1] = -0.0
    x[2, 1] = torch.nan
    x[3, 1] = -torch.nan
    x[4, 2] = torch.inf
    x[5, 2] = -torch.inf
    x[6, :2] = torch.tensor([torch.inf, torch.nan])
    x[7] = TINY_TOKEN / 2
    x[8] = TINY_TOKEN
    x[9] = torch.finfo(torch.float32).max
    x[10] = torch.finfo(torch.float32).smallest_normal
    x[11] = torch.finfo(torch.float32).smallest_normal / 4
    x[12] = -3.0
    x[13, 1:] = 1e-30
    assert_equal_to_twin(x, device)


def test_ties_round_to_even(device: torch.device) -> None:
    # absmax 127 makes the factor exactly 1
    x = torch.arange(-254, 255).float()[None] / 2
    xq = dispatch.quantize_act(x.to(device))[0].cpu().float()
    assert torch.equal(xq, x.round())
    assert_equal_to_twin(x, device)


def test_every_bfloat16_scale(device: torch.device) -> None:
    # all positive bfloat16 numbers as absmax, with fractions of them beside
    bits = torch.arange(0, 1 << 15, 97 if device.type == "cpu" else 1, dtype=torch.int16)
    top = bits.view(torch.bfloat16).float()[:, None]
    fractions = torch.linspace(-1, 1, 15)[None].repeat(len(bits), 1)
    x = torch.cat((top, torch.where(top.isfinite(), top * fractions, 1.0)), 1)
    assert_equal_to_twin(x, device)


def test_strided_rows(device: torch.device) -> None:
    x = tokens(4, 96)
    assert_equal_to_twin(x[:, :40], device)
    assert_equal_to_twin(x[::2], device)
    assert_equal_to_twin(x.t(), device)
    wide = x.to(device)
    assert torch.equal(dispatch.quantize_act(wide[:, 8:48])[0].cpu(), quantize_act(x[:, 8:48])[0])
    assert torch.equal(dispatch.quantize_act(wide.t())[0].cpu(), quantize_act(x.t())[0])
    assert torch.equal(dispatch.quantize_act(wide[:1].expand(3, 96))[1].cpu(),
                       quantize_act(x[:1].expand(3, 96))[1])  # fmt: skip


@pytest.mark.parametrize("x", [torch.zeros(2, 3, dtype=torch.float64), torch.tensor(1.0)])
def test_refused(x: torch.Tensor, device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"quantize_act: x must be bfloat16, .* got"):
        dispatch.quantize_act(x.to(device))


@pytest.mark.parametrize("k", [40, ONE_PASS + 8])
def test_candidates_agree(k: int, device: torch.device) -> None:
    x = tokens(9, k)
    spec, key = QuantizeSpec(k, x.dtype), device_key(device)
    tiles = candidates(spec, 16, key)
    assert heuristic(spec, 16, key) in tiles
    pairs = heuristic(spec, 128, key)
    for tile in (*tiles, pairs) if device.type == "cuda" else tiles[::4]:
        got = launch(build(QUANTIZE, spec, tile), x.to(device))
        assert torch.equal(got[0].cpu(), quantize_act(x)[0]), tile


@pytest.mark.parametrize("k", [1, 128, 4096, 14336, ONE_PASS, ONE_PASS + 1, 100000])
@pytest.mark.parametrize("size", [1, 64, 128, 8192])
@pytest.mark.parametrize("key", [A100, H200], ids=lambda key: key.name)
def test_heuristic_is_legal(k: int, size: int, key: DeviceKey) -> None:
    tile = heuristic(QuantizeSpec(k, torch.bfloat16), size, key)
    block, rows = tile["BLOCK_K"], tile["ROWS"]
    assert block * rows <= ONE_PASS
    assert block >= k or tile["LOOP"]
    assert block & (block - 1) == 0
    assert tile.num_warps in (1, 2, 4, 8, 16, 32)
    assert block * rows <= 128 * 32 * tile.num_warps


@pytest.mark.parametrize(
    ("k", "size", "key", "rows", "num_warps"),
    [
        (4096, 16, H200, 1, 8),
        (4096, 64, H200, 1, 8),
        (4096, 128, H200, 2, 16),
        (4096, 256, H200, 2, 16),
        (4096, 512, H200, 1, 8),
        (4096, 128, A100, 1, 8),
        (8192, 128, H200, 1, 16),
        (14336, 16, H200, 1, 32),
        (14336, 128, H200, 1, 32),
        (14336, 256, H200, 1, 16),
        (14336, 16, A100, 1, 16),
        (ONE_PASS + 8, 16, H200, 1, 16),
    ],
)
def test_tokens_and_warps_of_a_program(
    k: int, size: int, key: DeviceKey, rows: int, num_warps: int
) -> None:
    """Pairs where every SM would have a token, all warps for long ones that have an SM each."""
    tile = heuristic(QuantizeSpec(k, torch.bfloat16), size, key)
    assert (tile["ROWS"], tile.num_warps) == (rows, num_warps)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [127, 128, 1000, 4096, 11008, 14336, 28672])
@pytest.mark.parametrize("m", [1, 2, 17, 255, 1000, 4097])
def test_large(m: int, k: int, device: torch.device) -> None:
    assert_equal_to_twin(tokens(m, k).bfloat16(), device)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    x = torch.zeros(160_000, 14336, dtype=torch.bfloat16, device=device)  # 2.3e9 values
    x[-1] = torch.linspace(-1, 1, 14336)
    xq, scale, total = dispatch.quantize_act(x)
    want = quantize_act(x[-1:].cpu())
    assert torch.equal(xq[-1:].cpu(), want[0])
    assert torch.equal(scale[-1:].cpu(), want[1])
    assert torch.equal(total[-1:].cpu(), want[2])
    assert not xq[:-1].any()


def test_only_newer_gpus_start_a_kernel_before_the_one_before_has_ended() -> None:
    spec = QuantizeSpec(4096, torch.bfloat16)
    for arch, dependent in ((80, False), (89, False), (90, True)):
        tile = QUANTIZE.heuristic(spec, 64, DeviceKey("A", arch, 108, 163 * 1024))
        assert ("launch_pdl" in QUANTIZE.options(tile)) == dependent
        assert ("gdc_wait()" in generate(QUANTIZE, spec, tile)) == dependent
