"""KV4Cache: a transformers Cache that stores keys and values in 4 or 8 bit.

`update` appends through a qoqc op and returns 16-bit tensors dequantized by another, so any
attention is right in eager mode on any device; the attention pass fuses the dequantization away.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from qoqc.errors import Unsupported
from qoqc.ir.spec import KVSpec
from qoqc.runtime.kv_layers import KV4Layer, KV16Layer


class KV4Cache(Cache):
    """A static 4- or 8-bit cache for every layer of a decoder.

    config         the model's config (composite configs: their text part)
    max_cache_len  tokens per sequence, rounded up to whole pages of 64
    bits           4 or 8, or for each layer one of 4, 8, and 16 (kept as they are)
    prefill_kv     what the tokens of a prefill chunk attend to among themselves, see Options
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        bits: Literal[4, 8, 16] | Sequence[Literal[4, 8, 16]] = 4,
        prefill_kv: Literal["exact", "quantized"] = "exact",
    ) -> None:
        count = config.get_text_config(decoder=True).num_hidden_layers
        per_layer = [bits] * count if isinstance(bits, int) else list(bits)
        if len(per_layer) != count or not set(per_layer) <= {4, 8, 16}:
            raise ValueError(
                f"bits={bits!r}: expected 4, 8 or 16, or one of them for each of {count} layers"
            )
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len={max_cache_len}: expected at least 1 token")
        super().__init__(
            layers=[
                KV16Layer(max_cache_len) if b == 16 else KV4Layer(max_cache_len, b, prefill_kv)
                for b in per_layer
            ]
        )

    @property
    def is_initialized(self) -> bool:
        """Does it hold tokens? Models ask whether a prompt is the first (PaliGemma's has a prefix
        that sees all of itself)."""
        return not self.layers[0].empty

    def allocate(
        self,
        batch: int,
        specs: Sequence[KVSpec],
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        within: KV4Cache | None = None,
    ) -> None:
        """Allocate every layer now, outside any compiled region (CUDA graphs need that).

        dtype   of the layers that are kept in 16 bit
        within  a cache for as many tokens or more, whose memory this one then uses: of caches
                that share memory only one may be in use at a time
        """
        pools: Sequence[Any] = [None] * len(self.layers) if within is None else within.layers
        for layer, spec, pool in zip(self.layers, specs, pools, strict=True):
            if isinstance(layer, KV16Layer):
                layer.allocate(batch, spec, device, dtype, within=pool)
            else:
                layer.allocate(batch, spec, device, within=pool)

    def rows(self, first: int, last: int) -> KV4Cache:
        """The sequences first to last - 1 as a cache of their own, in the memory of this one.

        What is appended there is here as well, but for `empty` of the layers.
        """
        part = copy.copy(self)
        part.layers = [layer.rows(first, last) for layer in self.layers]
        return part

    def holding(self, tokens: int, device: torch.device) -> KV4Cache:
        """The same as if each sequence had so many tokens, to be asked about lengths and masks.

        Its keys and values are those of this cache: nothing may be appended. What is not allocated
        yet is so for one sequence, on `device`.
        """
        other = copy.copy(self)
        other.layers = [layer.holding(tokens, device) for layer in self.layers]
        return other

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of every sequence."""
        for layer in self.layers:
            layer.length.sub_(tokens)

    def bytes_per_token(self) -> int:
        """Memory of one token of one sequence in all layers; they must be allocated."""
        return sum(layer.bytes_per_token() for layer in self.layers)

    def crop(self, max_length: int) -> None:
        """Not possible on a static cache (assisted decoding asks for it)."""
        raise Unsupported("KV4Cache cannot be cropped; assisted decoding needs kv_bits=16")
