from __future__ import annotations

from typing import Literal

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.kernels.kv_append import KV_APPEND, candidates, launch
from qoqc.ir import kv_reference
from qoqc.ir.spec import PAGE, KVSpec
from qoqc.quant.kv import empty_pages, split_words
from qoqc.runtime.device import device_key

Bits = Literal[4, 8]
Pages = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def vectors(batch: int, heads: int, seq: int, dim: int, seed: int) -> torch.Tensor:
    """Random vectors of sizes 1e-4 to 1e4, as a transposed view like the projections give."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, seq, heads, dim, generator=generator)
    size = 10 ** (torch.rand(batch, seq, heads, 1, generator=generator) * 8 - 4)
    return (x * size).transpose(1, 2)


def used_pages(spec: KVSpec, count: int) -> Pages:
    """Pages full of what an earlier owner left."""
    generator = torch.Generator().manual_seed(count)
    pages = empty_pages(count, spec.kv_heads, spec.k_dim, spec.v_dim, spec.bits, "cpu")
    for p in pages:
        p.copy_(torch.randint(0, 256, p.shape, generator=generator))
    return pages


def copy(pages: Pages, device: torch.device) -> Pages:
    k_pages, v_pages, words = (p.to(device, copy=True) for p in pages)
    return k_pages, v_pages, words


def append(
    pages: Pages,
    table: torch.Tensor,
    start: list[int],
    k: torch.Tensor,
    v: torch.Tensor,
    bits: Bits,
    device: torch.device,
) -> Pages:
    """The pages after the kernel ran on copies of them."""
    copies = copy(pages, device)
    starts = torch.tensor(start, device=device)
    dispatch.kv4_append(*copies, table.to(device), starts, k.to(device), v.to(device), bits)
    return copy(copies, torch.device("cpu"))


def assert_same(got: Pages, want: Pages) -> None:
    for name, a, b in zip(("k_pages", "v_pages"), got, want, strict=False):
        assert torch.equal(a, b), name
    # NaN has many patterns
    for a, b in zip(split_words(got[2]), split_words(want[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    number = ~torch.stack([x.isnan() for x in split_words(want[2])]).any(0)
    assert torch.equal(got[2][number], want[2][number])


def check(
    spec: KVSpec,
    start: list[int],
    k: torch.Tensor,
    v: torch.Tensor,
    device: torch.device,
    per_sequence: int = 3,
) -> None:
    """The kernel leaves the bits of the definition in used pages, and touches no others."""
    batch = len(start)
    pages = used_pages(spec, batch * per_sequence + 2)
    table = torch.randperm(batch * per_sequence + 2)[: batch * per_sequence]
    table = table.view(batch, per_sequence).int()
    want = copy(pages, pages[0].device)
    kv_reference.kv_append(*want, table, torch.tensor(start), k, v, spec.bits)
    assert_same(append(pages, table, start, k, v, spec.bits, device), want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(80, 96), (2, 130)])
@pytest.mark.parametrize(
    ("seq", "start"),
    [(1, [0, 63]), (1, [31, 128]), (1, [32, 95]), (5, [60, 125]), (70, [30])],
)
def test_equal_to_the_definition(
    bits: Bits, k_dim: int, v_dim: int, seq: int, start: list[int], device: torch.device
) -> None:
    batch, heads = len(start), len(start)
    k, v = vectors(batch, heads, seq, k_dim, 0), vectors(batch, heads, seq, v_dim, 1)
    check(KVSpec(heads, k_dim, v_dim, bits), start, k, v, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    k, v = (vectors(1, 2, 3, 32, seed).to(dtype) for seed in (0, 1))
    check(KVSpec(2, 32, 32), [62], k, v, device)


@pytest.mark.parametrize("bits", [4, 8])
def test_special_vectors(bits: Bits, device: torch.device) -> None:
    k, v = vectors(1, 1, 9, 16, 0), vectors(1, 1, 9, 16, 1)
    for x in (k, v):
        x[:, :, 0] = 0
        x[:, :, 1] = 3.1
        x[:, :, 2, 5] = torch.nan
        x[:, :, 3, 6] = torch.inf
        x[:, :, 4, 7] = -torch.inf
        x[:, :, 5] = 1e6
        x[:, :, 6] *= 1e-30
        x[:, :, 7] = torch.arange(16.0)  # a scale of one: every code hits an integer
        x[:, :, 8] = torch.arange(16.0) / 2  # and the middle between two
        x[:, :, 8, 15] = 15
    check(KVSpec(1, 16, 16, bits), [58], k, v, device)


def test_ties_round_to_even(device: torch.device) -> None:
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 14.5, 15.0, 3.0, 4.0]).expand(1, 1, 1, 8)
    pages = used_pages(KVSpec(1, 8, 8), 1)
    got = append(pages, torch.zeros(1, 1, dtype=torch.int32), [0], x, x, 4, device)
    assert (got[1][0, 0, :, 0] & 15).tolist() == [0, 0, 2, 2, 14, 15, 3, 4]


@pytest.mark.parametrize("seq", [1, 3, 64])
def test_nothing_is_written_past_the_table(seq: int, device: torch.device) -> None:
    """Tokens beyond P * 64 are dropped, those before it are written."""
    spec, start = KVSpec(1, 16, 16), 2 * PAGE - 2
    pages = used_pages(spec, 4)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    k, v = vectors(1, 1, seq, 16, 0), vectors(1, 1, seq, 16, 1)
    want = copy(pages, pages[0].device)
    fits = min(seq, 2)
    kv_reference.kv_append(
        *want, table, torch.tensor([start]), k[:, :, :fits], v[:, :, :fits], spec.bits
    )
    assert_same(append(pages, table, [start], k, v, spec.bits, device), want)
    far = append(pages, table, [2 * PAGE + 5], k, v, spec.bits, device)
    assert_same(far, pages)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 2, 0)])
def test_nothing_to_append(shape: tuple[int, int, int], device: torch.device) -> None:
    spec = KVSpec(2, 16, 16)
    pages, table = used_pages(spec, 2), torch.zeros(shape[0], 1, dtype=torch.int32)
    x = torch.zeros(*shape, 16)
    assert_same(append(pages, table, [0] * shape[0], x, x, 4, device), pages)


def test_token_by_token_is_the_same_as_at_once(device: torch.device) -> None:
    spec = KVSpec(1, 16, 16)
    pages, table = used_pages(spec, 2), torch.tensor([[1, 0]], dtype=torch.int32)
    k, v = vectors(1, 1, 4, 16, 0), vectors(1, 1, 4, 16, 1)
    at_once = append(pages, table, [62], k, v, 4, device)
    for i in range(4):
        one = slice(i, i + 1)
        pages = append(pages, table, [62 + i], k[:, :, one], v[:, :, one], 4, device)
    assert_same(pages, at_once)


@pytest.mark.parametrize("seq", [1, 3])
def test_every_candidate_gives_the_same_bits(seq: int, device: torch.device) -> None:
    spec = KVSpec(1, 16, 16)
    pages = copy(used_pages(spec, 2), device)
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    start = torch.tensor([62], device=device)
    k, v = (vectors(1, 1, seq, 16, seed).to(device) for seed in (0, 1))
    results = []
    for tile in candidates(spec, seq, device_key(device)):
        copies = copy(pages, pages[0].device)
        launch(build(KV_APPEND, spec, tile), *copies, table, start, k, v)
        results.append(copies)
    assert len(results) > 2
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_refused() -> None:
    spec = KVSpec(2, 16, 16)
    pages, table = used_pages(spec, 2), torch.zeros(1, 1, dtype=torch.int32)
    start, x = torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match="do not fit the cache"):
        dispatch.kv4_append(*pages, table, start, x[:, :1], x, 4)
    with pytest.raises(ValueError, match="not a KV cache of 8 bits"):
        dispatch.kv4_append(*pages, table, start, x, x, 8)
    with pytest.raises(ValueError, match="pass int32 rows"):
        dispatch.kv4_append(*pages, table.long(), start, x, x, 4)
    with pytest.raises(ValueError, match="k_pages has strides"):
        dispatch.kv4_append(
            pages[0].expand(2, 2, 64, 8).transpose(0, 1), *pages[1:], table, start, x, x, 4
        )
    with pytest.raises(ValueError, match="1 sequences, but start"):
        dispatch.kv4_append(*pages, table, start.expand(2), x, x, 4)
    single = build(KV_APPEND, spec, KV_APPEND.heuristic(spec, 1, device_key(torch.device("cpu"))))
    with pytest.raises(ValueError, match="appends 1 token, got 3"):
        launch(single, *pages, table, start, x, x)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("batch", "seq", "dims"),
    [(64, 1, (128, 128)), (3, 1500, (128, 128)), (5, 130, (192, 128)), (2, 257, (256, 256))],
)
def test_large(
    bits: Bits, batch: int, seq: int, dims: tuple[int, int], device: torch.device
) -> None:
    spec = KVSpec(8, *dims, bits)
    start = [(37 * b) % 300 for b in range(batch)]
    k, v = vectors(batch, 8, seq, dims[0], 0).bfloat16(), vectors(batch, 8, seq, dims[1], 1)
    check(spec, start, k, v.bfloat16(), device, per_sequence=30)
