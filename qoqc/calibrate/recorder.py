"""A transformers Cache that keeps no past: it rounds keys and values and can remember them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from qoqc.errors import Unsupported
from qoqc.quant.kv import fake_quantize_kv


class _Passing(CacheLayerMixin):
    """A layer that transformers asks about the length of the past: there is none."""

    is_compileable = False
    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Never called: the Recorder answers for all layers."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys the mask must cover."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return 0

    def get_max_length(self) -> int:
        """Tokens a sequence can hold: no limit."""
        return -1

    get_max_cache_shape = get_max_length  # transformers 5.17 asks under the old name


class Recorder(Cache):
    """Gives every layer its own keys and values back, in `bits` bits.

    Through the cache, because that is the one place where every decoder hands over what its
    attention will read, after the rotary embedding and all norms.

    bits      16 leaves them as they are
    k, v      the last ones seen before rounding, [B, kv_heads, S, D]; None before an update
    """

    def __init__(self, layers: int) -> None:
        """A recorder for a decoder of `layers` layers; nothing is rounded yet."""
        super().__init__(layers=[_Passing() for _ in range(layers)])
        self.bits = 16
        self.name = ""
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Cache.update. Raises Unsupported for NaN or infinity, naming the layer."""
        for what, x in (("keys", key_states), ("values", value_states)):
            if not torch.isfinite(x).all():
                raise Unsupported(
                    f"{self.name or f'layer {layer_idx}'}: the calibration {what} hold NaN or "
                    "infinity; check the model in 16 bit on this text"
                )
        self.k, self.v = key_states, value_states
        if self.bits == 16:
            return key_states, value_states
        return fake_quantize_kv(key_states, self.bits), fake_quantize_kv(value_states, self.bits)

    def forget(self) -> None:
        """Drop what was remembered."""
        self.k = self.v = None
