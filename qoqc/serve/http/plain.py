"""transformers' own engine, for a model in 16 bit: `qoqc serve --plain`, and the baseline."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

PAGE_TOKENS = 256
"""Tokens per page, transformers' default."""

CPU_PAGES = 64
"""Pages on a CPU, if nobody says: each step makes a mask as wide as all of them."""


class PlainEngine(ContinuousBatchingManager):
    """A ContinuousBatchingManager that counts its pages."""

    def __init__(
        self, model: Any, generation_config: Any, config: Any, *, page_tokens: int
    ) -> None:
        super().__init__(model, generation_config, config)
        self._page_tokens = page_tokens

    @property
    def total_pages(self) -> int:
        """Pages of the cache; 0 before the engine has made it."""
        processor = self.batch_processor
        return 0 if processor is None else int(processor.cache.num_blocks)

    @property
    def free_pages(self) -> int:
        """Pages that no request has; some are kept for their prefix until they are needed."""
        processor = self.batch_processor
        if processor is None:
            return 0
        cache = processor.cache
        if hasattr(cache, "get_num_free_blocks"):  # transformers 5.17
            return int(cache.get_num_free_blocks())
        kept = [
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in cache.cache_allocators.values()
        ]
        share = sum(kept) / (cache.num_sectors * cache.bytes_per_sector)
        return int(round((cache.compute_free_capacity() + share) * cache.num_blocks))

    @property
    def request_tokens(self) -> int:
        """The longest request, prompt and output: one that has all pages; 0 without a cache."""
        return self.total_pages * int(self._page_tokens)


def plain_engine(
    model: Any,
    generation_config: GenerationConfig,
    *,
    max_tokens_per_batch: int | None = None,
    num_pages: int | None = None,
    memory_fraction: float | None = None,
    max_requests: int | None = None,
    page_tokens: int = PAGE_TOKENS,
) -> PlainEngine:
    """The engine, not started; the arguments are those of qoqc.serve.engine.engine."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    # pages were called blocks once; newer releases warn about that name
    page_size = "page_size" if "page_size" in known else "block_size"
    if num_pages is None and memory_fraction is None and model.device.type == "cpu":
        num_pages = CPU_PAGES
    config = ContinuousBatchingConfig(
        **{page_size: page_tokens},
        num_blocks=num_pages,
        max_batch_tokens=max_tokens_per_batch,
        max_memory_percent=memory_fraction,
        max_requests_per_batch=max_requests,
    )
    return PlainEngine(model, generation_config, config, page_tokens=page_tokens)
