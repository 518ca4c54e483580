"""One layer of a KV cache: in 4 or 8 bit, in pages; or, where rounding would ruin it, in 16 bit."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from transformers.cache_utils import CacheLayerMixin

from qoqc.errors import Unsupported
from qoqc.ir import ops
from qoqc.ir.spec import PAGE, KVSpec
from qoqc.quant.kv import empty_pages
from qoqc.runtime.dynamo import vary


class KV4Layer(CacheLayerMixin):
    """The cache of one attention layer: `max_cache_len` tokens for each sequence of the batch.

    Tensors after initialization, layouts in quant/kv.py: k_pages, v_pages, kv_words with batch *
    pages pages; block_table int32 [B, pages]; length int64 [B].
    """

    is_sliding = False

    def __init__(
        self,
        max_cache_len: int,
        bits: Literal[4, 8],
        prefill_kv: Literal["exact", "quantized"],
    ) -> None:
        super().__init__()
        self.pages_per_sequence = -(-max_cache_len // PAGE)
        # as text: an int that differs between two models of a process Dynamo takes for a variable
        self._bits = str(bits)
        self.prefill_kv = prefill_kv
        # a Python flag, so that Dynamo makes one graph for the first prefill and one for the rest
        self.empty = True

    @property
    def is_compileable(self) -> bool:
        """Is generate() to make the masks? Those of a first prompt the forward makes, in its graph,
        as it does for transformers' own growing cache."""
        return not self.empty

    @property
    def max_cache_len(self) -> int:
        """Tokens that each sequence can hold.

        Once there are tensors, from them: Dynamo then knows that masks of this length fit them.
        """
        pages = self.block_table.shape[1] if self.is_initialized else self.pages_per_sequence
        return pages * PAGE

    @property
    def bits(self) -> int:
        """Of one stored key or value: 4, 8 or 16."""
        return int(self._bits)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for keys [B, H, S, Dk] and values [B, H, S, Dv]; only shapes are read."""
        batch, heads, _, k_dim = key_states.shape
        self.allocate(batch, KVSpec(heads, k_dim, value_states.shape[-1]), key_states.device)

    def allocate(
        self, batch: int, spec: KVSpec, device: torch.device, *, within: KV4Layer | None = None
    ) -> None:
        """Allocate pages for `batch` sequences; head sizes from `spec`, bits from this layer.

        within  a layer of the same kind whose first pages are used instead of new ones
        """
        if self.bits == 4 and (spec.k_dim % 2 or spec.v_dim % 2):
            raise Unsupported(
                f"a 4-bit cache needs even head sizes, got {spec.k_dim} and {spec.v_dim}; "
                "use kv_bits=8"
            )
        pages = batch * self.pages_per_sequence
        if within is None:
            self.k_pages, self.v_pages, self.kv_words = empty_pages(
                pages, spec.kv_heads, spec.k_dim, spec.v_dim, self.bits, device
            )
        else:
            pools = (within.k_pages, within.v_pages, within.kv_words)
            self.k_pages, self.v_pages, self.kv_words = (pool[:pages] for pool in pools)
        table = torch.arange(pages, dtype=torch.int32, device=device)
        self.block_table = table.view(batch, self.pages_per_sequence)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        # transformers looks at these two names for "is there a cache", never at their values
        self.keys, self.values = self.k_pages, self.v_pages
        self._mark()
        self.is_initialized = True

    def _mark(self) -> None:
        """Tell Dynamo and CUDA graphs which sizes and addresses stay the same."""
        _keep_in_place(self.k_pages, self.v_pages, self.kv_words, self.block_table, self.length)
        _keep_sizes(self.k_pages, self.v_pages, self.kv_words)
        if not torch.compiler.is_compiling():
            for pool in (self.k_pages, self.v_pages, self.kv_words, self.length):
                vary(pool, 0)
            vary(self.block_table, 0, 1)

    def rows(self, first: int, last: int) -> KV4Layer:
        """The sequences first to last - 1 of an allocated layer, in the same memory."""
        part = copy.copy(self)
        part.block_table, part.length = self.block_table[first:last], self.length[first:last]
        part._mark()
        return part

    def holding(self, tokens: int, device: torch.device) -> KV4Layer:
        """The layer as if its sequences had `tokens` tokens each: see KV4Cache.holding."""
        other = copy.copy(self)
        if not other.is_initialized:
            other.allocate(1, KVSpec(1, 2, 2), device)
        other.length = torch.full_like(other.length, tokens)
        other.empty = False
        return other

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, S, D] and return what the new queries attend to, in 16 bit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._require_batch(key_states)
        pages = (self.k_pages, self.v_pages, self.kv_words, self.block_table)
        ops.kv4_append(*pages, self.length, key_states, value_states, self.bits)
        self.length.add_(key_states.shape[2])
        exact, first = self.prefill_kv == "exact", self.empty
        self.empty = False
        if first:
            if exact:
                return key_states, value_states
            return ops.kv4_round(key_states, self.bits), ops.kv4_round(value_states, self.bits)
        # a single new token takes part with its quantized value, so that a later re-read agrees
        with_chunk = exact and key_states.shape[2] > 1
        chunk = (key_states, value_states) if with_chunk else (None, None)
        k, v = ops.kv4_dequant(*pages, self.length, *chunk, self.bits, key_states.dtype)
        return k, v

    def _require_batch(self, key_states: torch.Tensor) -> None:
        if key_states.shape[0] != self.length.shape[0]:
            raise ValueError(
                f"this KV cache was allocated for a batch of {self.length.shape[0]}, "
                f"got {key_states.shape[0]} sequences"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys the mask must cover."""
        return (query_length if self.empty else self.max_cache_len, 0)

    def get_seq_length(self) -> Any:
        """Tokens stored: 0 before the first update, then a 0-d tensor on the cache's device."""
        return self.length[0] if self.is_initialized and not self.empty else 0

    def get_max_length(self) -> int:
        """Tokens each sequence can hold."""
        return self.max_cache_len

    def bytes_per_token(self) -> int:
        """Memory of one token of one sequence, read off the allocated tensors."""
        pools = (self.k_pages, self.v_pages, self.kv_words)
        tokens = self.length.shape[0] * self.max_cache_len
        return sum(pool.nbytes for pool in pools) // tokens

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


class KV16Layer(KV4Layer):
    """A layer whose keys and values rounding would ruin: kept as they are, among quantized ones.

    Tensors after initialization: keys, values [B, H, max_cache_len, D]; length int64 [B].
    """

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len, 8, "exact")
        self._bits = "16"

    @property
    def max_cache_len(self) -> int:
        """Tokens that each sequence can hold; once there are tensors, from them."""
        return self.keys.shape[2] if self.is_initialized else self.pages_per_sequence * PAGE

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for keys [B, H, S, Dk] and values [B, H, S, Dv], in their dtype."""
        batch, heads, _, k_dim = key_states.shape
        spec = KVSpec(heads, k_dim, value_states.shape[-1])
        self.allocate(batch, spec, key_states.device, key_states.dtype)

    def allocate(
        self,
        batch: int,
        spec: KVSpec,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        *,
        within: KV4Layer | None = None,
    ) -> None:
        """Allocate for `batch` sequences, or take the front of what a 16-bit layer has."""
        shape = (batch, spec.kv_heads, self.max_cache_len)
        if within is None:
            self.keys = torch.zeros(*shape, spec.k_dim, dtype=dtype, device=device)
            self.values = torch.zeros(*shape, spec.v_dim, dtype=dtype, device=device)
        else:
            count = batch * spec.kv_heads * self.max_cache_len
            self.keys = within.keys.view(-1)[: count * spec.k_dim].view(*shape, spec.k_dim)
            self.values = within.values.view(-1)[: count * spec.v_dim].view(*shape, spec.v_dim)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self._mark()
        self.is_initialized = True

    def _mark(self) -> None:
        """Tell Dynamo and CUDA graphs which sizes and addresses stay the same."""
        _keep_in_place(self.keys, self.values, self.length)
        _keep_sizes(self.keys, self.values, fixed=(1, 3))

    def rows(self, first: int, last: int) -> KV16Layer:
        """The sequences first to last - 1 of an allocated layer, in the same memory."""
        part = copy.copy(self)
        parts = (tensor[first:last] for tensor in (self.keys, self.values, self.length))
        part.keys, part.values, part.length = parts
        part._mark()
        return part

    def bytes_per_token(self) -> int:
        """Memory of one token of one sequence, read off the allocated tensors."""
        tokens = self.length.shape[0] * self.max_cache_len
        return (self.keys.nbytes + self.values.nbytes) // tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, S, D] and return what the new queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._require_batch(key_states)
        # all sequences of a batch are of one length, padding included
        places = torch.arange(key_states.shape[2], device=self.keys.device) + self.length[0]
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        self.length.add_(key_states.shape[2])
        first, self.empty = self.empty, False
        if first:
            return key_states, value_states
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i continues what sequence beam_idx[i] was (beam search)."""
        if self.is_initialized:
            index = beam_idx.to(self.length.device)
            for tensor in (self.keys, self.values, self.length):
                tensor.copy_(tensor.index_select(0, index))


def _keep_in_place(*tensors: torch.Tensor) -> None:
    """Tell CUDA graphs that the tensors' addresses stay the same."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def _keep_sizes(*tensors: torch.Tensor, fixed: tuple[int, ...] = (1, 2, 3)) -> None:
    """Tell Dynamo that these sizes belong to the model.

    It takes every size in which two caches of a process differ for a variable, and no pass could
    tell heads and bits from it.
    """
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            for dim in fixed:
                torch._dynamo.mark_static(tensor, dim)
