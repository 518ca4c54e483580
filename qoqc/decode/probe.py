"""What a model keeps per layer in a cache, told by its own code without running a kernel."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses import fake_tensor
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from qoqc.errors import Unsupported
from qoqc.ir.spec import KVSpec
from qoqc.log import get_logger

log = get_logger("decode")


def probe_kv(model: Any) -> list[KVSpec]:
    """Each layer's KV head count and head sizes, read off one eager step on a 16-bit cache.

    Asking the cache works for every attention (MLA, per-layer sizes); config names differ. The
    step computes shapes only, nothing runs on the device, unless the model's code asks for values.
    Raises Unsupported when a layer keeps no keys and values, or a state besides them (linear
    attention, state space).
    """
    try:
        with _unchanged(model), _shapes_only():
            cache = _one_token(model)
    except Exception as error:  # if the model is at fault, the real step says so
        log.info("%s needs values to tell its shapes: %r", type(model).__name__, error)
        cache = _one_token(model)
    specs = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4:
            raise Unsupported(f"layer {number} keeps no keys and values; compile with kv_bits=16")
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            reason = f"layer {number} keeps a state besides keys and values"
            raise Unsupported(f"{reason}; compile with kv_bits=16")
        specs.append(KVSpec(keys.shape[1], keys.shape[-1], values.shape[-1]))
    return specs


def _one_token(model: Any) -> DynamicCache:
    """The cache of a model that has seen one token."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model.forward(input_ids=token, past_key_values=cache, use_cache=True)
    return cache


@contextmanager
def _unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Take back what the block puts into attributes and buffers of the model's modules.

    Some keep a mask or rotary tables from one call to the next: made here they have no values.
    """
    places = [place for module in model.modules() for place in (vars(module), module._buffers)]
    before = [dict(place) for place in places]
    try:
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            same = place.keys() == old.keys() and all(place[name] is old[name] for name in old)
            if not same:
                place.clear()
                place.update(old)


@contextmanager
def _shapes_only() -> Iterator[None]:
    """Tensors made in the block have shape, dtype and device, but no values; asking for one raises.

    torch logs some of these errors by itself: not here, where they only mean that a real step runs.
    """
    logger = logging.getLogger(fake_tensor.__name__)

    def silent(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(silent)
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logger.removeFilter(silent)
