"""What is in memory: 4-bit weights and 4-bit caches, and not the 16-bit ones beside them."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig

import qoqc
from qoqc.decode.caches import MAX_CACHES, cache_length
from qoqc.ir.spec import KVSpec
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.runtime.weights import STORE
from qoqc.shapes import shape
from qoqc.testing import VOCAB, tiny_model

KV_BYTES_LLAMA_3_8B = 34_816
"""Layers * KV heads * (keys and values in 4 bit, and two words): 32 * 8 * (64 + 64 + 8)."""


def generate(model: Any, batch: int = 1, prompt: int = 8, tokens: int = 3) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (batch, prompt), generator=torch.Generator().manual_seed(0))
    out: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, eos_token_id=None
    )
    return out


def test_16bit_linears_are_gone_after_compile() -> None:
    torch._dynamo.reset()
    model = tiny_model("llama", torch.bfloat16)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    storages = [StorageWeakRef(m.weight.untyped_storage()) for m in linears]
    dense = sum(m.weight.nbytes for m in linears)
    qoqc.compile(model, glue="eager", release=True)
    assert not any(storage.expired() for storage in storages)
    generate(model)
    gc.collect()
    assert len(storages) == 14
    assert all(storage.expired() for storage in storages)
    packed = sum(
        tensor.nbytes
        for bundle in STORE.bundles_of(model)
        for tensor in bundle.packed.tensors().values()
    )
    # 4 bits and the scales of groups of 128 and of channels; tiny weights have many channels
    assert packed < 0.35 * dense


def test_prefill_and_decode_share_one_packed_copy() -> None:
    """Both graphs, with gate and up in turns: no linear is held in two groupings."""
    torch._dynamo.reset()
    model = qoqc.compile(tiny_model("llama", torch.bfloat16), glue="eager", release=True)
    generate(model)
    first = {id(bundle) for bundle in STORE.bundles_of(model)}
    generate(model, batch=2, prompt=5)
    assert {id(bundle) for bundle in STORE.bundles_of(model)} == first
    assert len(first) == 2 * 4


def test_kv_bytes_per_token() -> None:
    config = AutoConfig.for_model(**shape("llama-3-8b"))
    cache = KV4Cache(config, 64)
    spec = KVSpec(config.num_key_value_heads, config.head_dim, config.head_dim)
    cache.allocate(2, [spec] * config.num_hidden_layers, torch.device("cpu"))
    assert cache.bytes_per_token() == KV_BYTES_LLAMA_3_8B
    held = [t for layer in cache.layers for t in (layer.k_pages, layer.v_pages, layer.kv_words)]
    assert sum(t.nbytes for t in held) == 2 * 64 * KV_BYTES_LLAMA_3_8B


def test_caches_of_all_sizes_share_one_memory() -> None:
    torch._dynamo.reset()
    model = qoqc.compile(tiny_model("llama"), glue="eager")
    large = generate(model, batch=3, prompt=300)
    caches, pool = model.qoqc_caches._caches, model.qoqc_caches._pool
    expected = generate(model, batch=2)
    generate(model, batch=1)
    assert set(caches) == {(3, 320), (2, 256), (1, 256)}
    for cache in caches.values():
        for layer, whole in zip(cache.layers, pool.layers, strict=True):
            assert layer.k_pages.data_ptr() == whole.k_pages.data_ptr()
            assert layer.k_pages.shape[0] <= whole.k_pages.shape[0]
    # what others wrote there in between is not seen
    assert torch.equal(generate(model, batch=2), expected)
    assert torch.equal(generate(model, batch=3, prompt=300), large)
    generate(model, batch=4, prompt=300)
    assert set(caches) == {(4, 320)}


def test_old_sizes_are_forgotten() -> None:
    torch._dynamo.reset()
    model = qoqc.compile(tiny_model("llama", num_hidden_layers=1), glue="eager")
    provider = model.qoqc_caches
    for batch in range(MAX_CACHES + 2, 0, -1):
        provider.get(batch, 100)
    assert list(provider._caches) == [(batch, 256) for batch in range(MAX_CACHES, 0, -1)]


def test_cache_lengths() -> None:
    """Pages of 64, at most a quarter too long beyond the smallest."""
    for tokens in range(1, 5000, 7):
        length = cache_length(tokens)
        assert length >= tokens
        assert length % 64 == 0
        assert length == 256 or length < 1.25 * tokens + 64
    assert cache_length(1535) == 1536
    assert len({cache_length(tokens) for tokens in range(1, 4097)}) == 1 + 4 * 4
