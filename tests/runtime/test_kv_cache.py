"""KV4Cache in eager mode: what it stores, gives back, and tells transformers about itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from qoqc.errors import CacheFull, Unsupported
from qoqc.ir import ops
from qoqc.ir.spec import KVSpec
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.runtime.kv_layers import KV4Layer, KV16Layer
from qoqc.testing import tiny_config

SPEC = KVSpec(2, 32, 16)


def layer(bits: Any = 4, prefill_kv: Any = "exact", **kwargs: Any) -> KV4Layer:
    made = KV4Layer(100, bits, prefill_kv, **kwargs)
    made.allocate(3, SPEC, torch.device("cpu"))
    return made


def chunk(seq: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, 2, seq, SPEC.k_dim, generator=generator),
        torch.randn(3, 2, seq, SPEC.v_dim, generator=generator),
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("prefill_kv", ["exact", "quantized"])
def test_what_queries_see(bits: Any, prefill_kv: Any) -> None:
    """First chunk alone; then the rounded past, with the new chunk exact or rounded."""
    cache, past, new = layer(bits, prefill_kv), chunk(6, 1), chunk(3, 2)
    exact = prefill_kv == "exact"
    for got, x in zip(cache.update(*past), past, strict=True):
        torch.testing.assert_close(got, x if exact else ops.kv4_round(x, bits))
    for got, old, x in zip(cache.update(*new), past, new, strict=True):
        assert got.shape[2] == 128
        torch.testing.assert_close(got[:, :, :6], ops.kv4_round(old, bits))
        torch.testing.assert_close(got[:, :, 6:9], x if exact else ops.kv4_round(x, bits))
        assert not got[:, :, 9:].any()


def test_a_single_token_takes_part_rounded() -> None:
    cache, new = layer(), chunk(1, 2)
    cache.update(*chunk(6, 1))
    k, _ = cache.update(*new)
    torch.testing.assert_close(k[:, :, 6:7], ops.kv4_round(new[0], 4))


def test_before_the_first_prompt_it_is_as_transformers_growing_cache() -> None:
    """Then models make its masks themselves, and know that it is the first."""
    config = tiny_config("llama")
    cache, growing = KV4Cache(config, 128), DynamicCache(config=config)
    cache.allocate(3, [SPEC, SPEC], torch.device("cpu"))
    assert (cache.is_initialized, cache.is_compileable) == (False, False)
    assert (growing.is_initialized, growing.is_compileable) == (False, False)
    for number in range(2):
        for each in (cache, growing):
            each.update(*chunk(6, 1), number)
    assert cache.is_initialized
    assert growing.is_initialized
    assert cache.is_compileable  # from then on its size is fixed, and growing's is not


@pytest.mark.parametrize("allocated", [True, False])
def test_holding_is_asked_about_lengths_only(allocated: bool) -> None:
    config, device = tiny_config("llama"), torch.device("cpu")
    cache = KV4Cache(config, 128, [4, 16])
    if allocated:
        cache.allocate(2, [KVSpec(2, 32, 32)] * 2, device)
    other = cache.holding(75, device)
    assert [int(other.get_seq_length(number)) for number in range(2)] == [75, 75]
    assert [other.get_mask_sizes(1, number) for number in range(2)] == [(128, 0)] * 2
    assert other.is_compileable
    assert [cache.get_seq_length(number) for number in range(2)] == [0, 0]
    assert not cache.is_initialized
    assert [layer.is_initialized for layer in cache.layers] == [allocated] * 2


def test_sizes_told_to_transformers() -> None:
    cache = layer()
    assert cache.get_max_length() == 128  # whole pages
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(6) == (6, 0)
    cache.update(*chunk(6, 1))
    assert cache.get_seq_length() == 6
    assert cache.get_mask_sizes(1) == (128, 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(2) == (2, 0)


def test_reset_forgets() -> None:
    cache = layer()
    cache.update(*chunk(40, 1))
    cache.reset()
    cache.update(*chunk(2, 2))
    k, _ = cache.update(*chunk(1, 3))
    torch.testing.assert_close(k[:, :, :2], ops.kv4_round(chunk(2, 2)[0], 4))
    assert not k[:, :, 3:].any()


def test_pages_cross_their_border() -> None:
    cache, long = layer(), chunk(70, 1)
    cache.update(*long)
    k, v = cache.update(*chunk(1, 2))
    torch.testing.assert_close(k[:, :, :70], ops.kv4_round(long[0], 4))
    torch.testing.assert_close(v[:, :, :70], ops.kv4_round(long[1], 4))


def test_reorder_equals_reordered_input() -> None:
    index = torch.tensor([2, 0, 0])
    cache, other = layer(), layer()
    cache.update(*chunk(6, 1))
    cache.reorder_cache(index)
    other.update(*(x[index] for x in chunk(6, 1)))
    for a, b in zip(cache.update(*chunk(1, 2)), other.update(*chunk(1, 2)), strict=True):
        assert torch.equal(a, b)


def test_reorder_before_use_is_nothing() -> None:
    KV4Layer(64, 4, "exact").reorder_cache(torch.tensor([0]))


def test_full() -> None:
    cache = layer()
    cache.update(*chunk(128, 1))
    with pytest.raises(CacheFull, match="holds 128 tokens, token 129 was appended; allocate it"):
        cache.update(*chunk(1, 2))


def test_another_batch() -> None:
    cache = layer()
    with pytest.raises(ValueError, match="batch of 3, got 2 sequences"):
        cache.update(*(x[:2] for x in chunk(1, 1)))


def test_odd_heads_need_8_bits() -> None:
    odd = KVSpec(2, 33, 16)
    with pytest.raises(Unsupported, match="even head sizes, got 33 and 16; use kv_bits=8"):
        KV4Layer(64, 4, "exact").allocate(1, odd, torch.device("cpu"))
    KV4Layer(64, 8, "exact").allocate(1, odd, torch.device("cpu"))


def test_cache_options() -> None:
    config = tiny_config("llama")
    assert [layer.bits for layer in KV4Cache(config, 64, [4, 8]).layers] == [4, 8]
    assert [layer.bits for layer in KV4Cache(config, 64, 8).layers] == [8, 8]
    assert [layer.bits for layer in KV4Cache(config, 64, [4, 16]).layers] == [4, 16]
    wrong: tuple[Any, ...] = (5, [4], [4, 4, 4], [4, 5])
    for bits in wrong:
        with pytest.raises(ValueError, match="expected 4, 8 or 16, or one of them for each of 2"):
            KV4Cache(config, 64, bits)
    with pytest.raises(ValueError, match="expected at least 1 token"):
        KV4Cache(config, 0)
    with pytest.raises(Unsupported, match="cannot be cropped"):
        KV4Cache(config, 64).crop(3)


def test_a_16bit_layer_keeps_what_it_is_given() -> None:
    cache, past, new = KV16Layer(100), chunk(6, 1), chunk(3, 2)
    for got, x in zip(cache.update(*past), past, strict=True):
        assert torch.equal(got, x)
    assert cache.get_mask_sizes(3) == (128, 0)
    for got, old, x in zip(cache.update(*new), past, new, strict=True):
        assert got.shape[2] == 128
        assert torch.equal(got[:, :, :9], torch.cat((old, x), dim=2))
        assert not got[:, :, 9:].any()
    assert int(cache.get_seq_length()) == 9
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(cache.keys[0, :, :6], past[0][2])
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="allocated for a batch of 3, got 1 sequences"):
        cache.update(*(x[:1] for x in new))


def test_a_16bit_layer_is_allocated_in_the_dtype_of_the_model() -> None:
    cache = KV4Cache(tiny_config("llama"), 64, [4, 16])
    cache.allocate(1, [SPEC, SPEC], torch.device("cpu"), torch.float16)
    assert (cache.layers[0].k_pages.dtype, cache.layers[1].keys.dtype) == (
        torch.uint8,
        torch.float16,
    )


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_caches_in_one_memory(bits: Any) -> None:
    """A cache within a larger one gives what one of its own would, and allocates nothing."""
    config = tiny_config("llama", num_hidden_layers=1)
    spec, cpu = KVSpec(2, 32, 16), torch.device("cpu")
    large, small, own = (KV4Cache(config, length, bits) for length in (200, 100, 100))
    large.allocate(3, [spec], cpu, torch.float32)
    small.allocate(2, [spec], cpu, torch.float32, within=large)
    own.allocate(2, [spec], cpu, torch.float32)
    for layer in large.layers:  # what is there of an earlier use must not be seen
        layer.keys.fill_(7)
        layer.values.fill_(7)
    for seq, seed in ((6, 1), (3, 2)):
        k, v = chunk(seq, seed)
        got = small.layers[0].update(k[:2], v[:2])
        expected = own.layers[0].update(k[:2], v[:2])
        for a, b in zip(got, expected, strict=True):
            length = 9 if a.shape[2] > 9 else a.shape[2]  # beyond it nothing was written
            assert torch.equal(a[:, :, :length], b[:, :, :length])
    base = large.layers[0].keys.data_ptr()
    assert small.layers[0].keys.data_ptr() == base
    assert small.bytes_per_token() == own.bytes_per_token() == large.bytes_per_token()


def test_rewind_forgets_the_last_tokens() -> None:
    config = tiny_config("llama", num_hidden_layers=1)
    cache = KV4Cache(config, 100)
    cache.allocate(3, [SPEC], torch.device("cpu"))
    cache.layers[0].update(*chunk(6, 1))
    cache.layers[0].update(*chunk(1, 2))
    expected = cache.layers[0].update(*chunk(1, 3))[0][:, :, :6].clone()
    cache.rewind(2)
    assert int(cache.get_seq_length()) == 6
    again = cache.layers[0].update(*chunk(1, 4))[0]
    assert int(cache.get_seq_length()) == 7
    assert torch.equal(again[:, :, :6], expected)
