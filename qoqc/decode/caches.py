"""The caches generate() gets: of any batch and length, in one memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from qoqc.config import Options
from qoqc.decode.probe import probe_kv
from qoqc.ir.spec import KVSpec
from qoqc.runtime.kv_cache import KV4Cache

MIN_CACHE = 256
"""Smallest cache allocated, in tokens."""

SIZES_PER_DOUBLING = 4
"""Cache sizes between a power of two and the next: generations of similar length share a cache
and its CUDA graphs, and at most a quarter of its memory is for nothing."""

MAX_CACHES = 8
"""Batch sizes and lengths whose caches, views of one memory, and graphs are kept."""


class CacheProvider:
    """Hands generate() a KV4Cache: for a batch and length seen before the same one again.

    They share one memory, of the largest so far: a cache is good until the next generation.
    """

    def __init__(self, model: Any, options: Options) -> None:
        self._model = weakref.ref(model)
        self._options = options
        self._default = model._prepare_cache_for_generation
        self._specs: list[KVSpec] | None = None
        self._caches: dict[tuple[int, int], KV4Cache] = {}
        self._pool: KV4Cache | None = None
        self._pool_tokens = 0

    def prepare(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """The replacement for GenerationMixin._prepare_cache_for_generation."""
        # generate() would wrap the forward once more for compileable caches
        generation_config.disable_compile = True
        chosen = (
            model_kwargs.get("past_key_values") is not None
            or generation_config.use_cache is False
            or generation_config.cache_implementation is not None
        )
        if chosen:
            return self._default(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        beams = max(generation_config.num_beams, generation_config.num_return_sequences)
        model_kwargs["past_key_values"] = self.get(batch_size * beams, max_cache_length)
        return None

    def get(self, batch: int, length: int) -> KV4Cache:
        """An empty cache for `batch` sequences of `length` tokens or more."""
        size = (batch, cache_length(length))
        if self._pool is not None and self._pool.layers[0].length.device != self._live().device:
            self._drop()
        cache = self._caches.pop(size, None)
        if cache is None:
            cache = self._make(*size)
        # last in the dict: used last
        self._caches[size] = cache
        while len(self._caches) > MAX_CACHES:
            self._caches.pop(next(iter(self._caches)))
        cache.reset()
        return cache

    def _make(self, batch: int, length: int) -> KV4Cache:
        """A cache within the memory of the pool, which is made anew if it is too small."""
        if self._specs is None:
            self._specs = probe_kv(self._live())
        if self._pool is None or self._pool_tokens < batch * length:
            # the old memory first, and with it all that points there
            self._drop()
            self._pool = self._allocate(batch, length, None)
            self._pool_tokens = batch * length
        return self._allocate(batch, length, self._pool)

    def _drop(self) -> None:
        self._caches.clear()
        self._pool, self._pool_tokens = None, 0

    def _live(self) -> Any:
        model = self._model()
        assert model is not None, "its generate() is running"
        return model

    def _allocate(self, batch: int, length: int, within: KV4Cache | None) -> KV4Cache:
        assert self._specs is not None
        model = self._live()
        cache = KV4Cache(
            model.config,
            length,
            self._options.kv_layers or self._options.kv_bits,
            self._options.prefill_kv,
        )
        # it outlives this generation, and the next may not run in inference mode
        with torch.inference_mode(False):
            cache.allocate(batch, self._specs, model.device, model.dtype, within)
        return cache


def cache_length(tokens: int) -> int:
    """The size of the cache for sequences of `tokens`: rounded up, see SIZES_PER_DOUBLING."""
    if tokens <= MIN_CACHE:
        return MIN_CACHE
    step = (1 << (tokens - 1).bit_length()) // 2 // SIZES_PER_DOUBLING
    return -(-tokens // step) * step
