"""KV4Cache: a transformers Cache that stores keys and values in 4 or 8 bit.

`update` appends through a qoqc op and returns 16-bit tensors dequantized by another, so any
attention is right in eager mode on any device; the attention pass fuses the dequantization away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from qoqc.errors import Unsupported
from qoqc.ir import ops
from qoqc.ir.spec import PAGE, KVSpec
from qoqc.quant.kv import empty_pages


class KV4Layer(CacheLayerMixin):
    """The cache of one attention layer: `max_cache_len` tokens for each sequence of the batch.

    Tensors after initialization, layouts in quant/kv.py: k_pages, v_pages, kv_words with batch *
    pages pages; block_table int32 [B, pages]; length int64 [B].
    """

    is_compileable = True
    is_sliding = False

    def __init__(
        self,
        max_cache_len: int,
        bits: Literal[4, 8],
        prefill_kv: Literal["exact", "quantized"],
        whole_prefill: bool = False,
    ) -> None:
        super().__init__()
        self.whole_prefill = whole_prefill
        self.pages_per_sequence = -(-max_cache_len // PAGE)
        self.max_cache_len = self.pages_per_sequence * PAGE
        self.bits = bits
        self.prefill_kv = prefill_kv
        # a Python flag, so that Dynamo makes one graph for the first prefill and one for the rest
        self.empty = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for keys [B, H, S, Dk] and values [B, H, S, Dv]; only shapes are read."""
        batch, heads, _, k_dim = key_states.shape
        self.allocate(batch, KVSpec(heads, k_dim, value_states.shape[-1]), key_states.device)

    def allocate(self, batch: int, spec: KVSpec, device: torch.device) -> None:
        """Allocate pages for `batch` sequences; head sizes from `spec`, bits from this layer."""
        if self.bits == 4 and (spec.k_dim % 2 or spec.v_dim % 2):
            raise Unsupported(
                f"a 4-bit cache needs even head sizes, got {spec.k_dim} and {spec.v_dim}; "
                "use kv_bits=8"
            )
        pages = batch * self.pages_per_sequence
        self.k_pages, self.v_pages, self.kv_words = empty_pages(
            pages, spec.kv_heads, spec.k_dim, spec.v_dim, self.bits, device
        )
        table = torch.arange(pages, dtype=torch.int32, device=device)
        self.block_table = table.view(batch, self.pages_per_sequence)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        # transformers looks at these two names for "is there a cache", never at their values
        self.keys, self.values = self.k_pages, self.v_pages
        if not torch.compiler.is_compiling():
            for tensor in (
                self.k_pages,
                self.v_pages,
                self.kv_words,
                self.block_table,
                self.length,
            ):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, S, D] and return what the new queries attend to, in 16 bit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.length.shape[0]:
            raise ValueError(
                f"this KV cache was allocated for a batch of {self.length.shape[0]}, "
                f"got {key_states.shape[0]} sequences"
            )
        pages = (self.k_pages, self.v_pages, self.kv_words, self.block_table)
        ops.kv4_append(*pages, self.length, key_states, value_states, self.bits)
        self.length.add_(key_states.shape[2])
        exact, first = self.prefill_kv == "exact", self.empty
        self.empty = False
        if first and not self.whole_prefill:
            if exact:
                return key_states, value_states
            return ops.kv4_round(key_states, self.bits), ops.kv4_round(value_states, self.bits)
        # a single new token takes part with its quantized value, so that a later re-read agrees
        with_chunk = exact and (first or key_states.shape[2] > 1)
        chunk = (key_states, value_states) if with_chunk else (None, None)
        k, v = ops.kv4_dequant(*pages, self.length, *chunk, self.bits, key_states.dtype)
        return k, v

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys the mask must cover."""
        only_new = self.empty and not self.whole_prefill
        return (query_length, 0) if only_new else (self.max_cache_len, 0)

    def get_seq_length(self) -> Any:
        """Tokens stored: 0 before the first update, then a 0-d tensor on the cache's device."""
        return self.length[0] if self.is_initialized and not self.empty else 0

    def get_max_length(self) -> int:
        """Tokens each sequence can hold."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # transformers 5.17 asks under the old name

    def reset(self) -> None:
        """Forget all tokens; the storage stays."""
        self.empty = True
        if self.is_initialized:
            self.length.zero_()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i continues what sequence beam_idx[i] was (beam search); copies pages."""
        if not self.is_initialized:
            return
        index = beam_idx.to(self.length.device)
        rows = self.block_table.index_select(0, index).reshape(-1).long()
        for pool in (self.k_pages, self.v_pages, self.kv_words):
            pool.copy_(pool.index_select(0, rows))
        self.length.copy_(self.length.index_select(0, index))


class KV4Cache(Cache):
    """A static 4- or 8-bit cache for every layer of a decoder.

    config         the model's config (composite configs: their text part)
    max_cache_len  tokens per sequence, rounded up to whole pages of 64
    bits           4 or 8, or one of them per layer
    prefill_kv     what the tokens of a prefill chunk attend to among themselves, see Options
    whole_prefill  give the first chunk back in the full length of the cache, as later ones: for
                   models that make their own masks of that length (BLOOM)
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        bits: Literal[4, 8] | Sequence[Literal[4, 8]] = 4,
        prefill_kv: Literal["exact", "quantized"] = "exact",
        whole_prefill: bool = False,
    ) -> None:
        count = config.get_text_config(decoder=True).num_hidden_layers
        per_layer = [bits] * count if isinstance(bits, int) else list(bits)
        if len(per_layer) != count or not set(per_layer) <= {4, 8}:
            raise ValueError(f"bits={bits!r}: expected 4 or 8, or one of them for {count} layers")
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len={max_cache_len}: expected at least 1 token")
        super().__init__(
            layers=[KV4Layer(max_cache_len, b, prefill_kv, whole_prefill) for b in per_layer]
        )

    def allocate(self, batch: int, specs: Sequence[KVSpec], device: torch.device) -> None:
        """Allocate every layer now, outside any compiled region (CUDA graphs need that)."""
        for layer, spec in zip(self.layers, specs, strict=True):
            layer.allocate(batch, spec, device)

    def crop(self, max_length: int) -> None:
        """Not possible on a static cache (assisted decoding asks for it)."""
        raise Unsupported("KV4Cache cannot be cropped; assisted decoding needs kv_bits=16")
