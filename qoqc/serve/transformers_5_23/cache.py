"""The KV store: transformers decides which request has which page, the pages are qoqc's.

A page of ours in all layers is what transformers calls a block, and its sector: the unit of
allocation. Sharing of prefixes, forks and offloading work on blocks and stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    CachePool,
    FullAttentionCacheAllocator,
)

from qoqc.ir.spec import PAGE
from qoqc.serve.accounting import Sizes, block_bytes
from qoqc.serve.pages import PageBytes, Pages

ATTENTION = "full_attention"
"""Layers with a window keep all tokens too: one block table serves all layers."""


class PageAllocator(FullAttentionCacheAllocator):
    """Which blocks a request has; all layers are in its group."""

    def __init__(self, pages: Pages, allow_block_sharing: bool) -> None:
        self._before_cache_tensor_init(
            index=0,
            layer_indices=list(range(len(pages.layers))),
            tokens_per_page=PAGE,
            # transformers' page is one of one layer, and all are of a size; only the block counts
            bytes_per_page=block_bytes(pages.specs) // len(pages.layers),
            allow_block_sharing=allow_block_sharing,
        )
        self.bytes_per_block = block_bytes(pages.specs)
        self.num_blocks, self.blocks_per_sector = pages.count, 1
        self._copy_view: Any = PageBytes(pages)
        # of the indices of single tokens, which are not used here
        self.read_trash_index = self.sentinel_index = self.write_trash_index = 0

    def join(self, pool: CachePool) -> None:
        """Take blocks from `pool` from now on."""
        self.pool = pool
        pool.set_blocks_per_sector(self.index, self.blocks_per_sector)


class KV4PagedCache(PagedAttentionCache):
    """Pages of 4 or 8 bit in the place of transformers' tensor."""

    # its __init__ makes 16-bit tensors and counts in their bytes
    def __init__(
        self,
        config: Any,
        pages: Pages,
        sizes: Sizes,
        dtype: torch.dtype,
        allow_block_sharing: bool,
    ) -> None:
        """pages: at least `sizes.num_pages`; dtype: of the model."""
        self.config, self.dtype, self.device = config, dtype, pages.device
        self.pages = pages
        self.max_blocks_per_request = sizes.pages_per_request
        self.max_batch_tokens = sizes.max_tokens_per_batch
        self.num_blocks = self.num_sectors = sizes.num_pages

        allocator = PageAllocator(pages, allow_block_sharing)
        self.cache_allocators = {ATTENTION: allocator}
        self.layer_to_allocator = dict.fromkeys(allocator.layer_indices, allocator)
        self.bytes_per_sector = allocator.bytes_per_block
        self.tokens_per_sector = PAGE
        # sector 0 is the padding page
        self.pool = CachePool(self.num_sectors, 1, num_reserved_sectors=1)
        allocator.join(self.pool)

        self.allow_block_sharing = allow_block_sharing
        self.use_prefix_sharing = allow_block_sharing
        self.read_cache_limit = None
        self.max_decode_fast_path_length = PAGE * sizes.pages_per_request
        self.max_tokens_read = PAGE * self.num_blocks

    @property
    def free_pages(self) -> int:
        """Pages that a new request could have, those kept for their prefix included."""
        allocator = self.cache_allocators[ATTENTION]
        owned_by_none: int = self.pool.num_free_sectors + self.pool.count_free_blocks(0)
        return owned_by_none + len(allocator.ledger.cached_blocks)

    def blocks_of(self, request_id: str) -> list[int]:
        """The pages of a request, first to last."""
        blocks: list[int] = self.cache_allocators[ATTENTION].block_table[request_id]
        return blocks

    def extend_read_and_write_indices(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the steps find tokens by their pages, not one by one."""

    def fill_block_table(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the steps have tables of their own."""
