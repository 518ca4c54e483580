"""The captured steps of one model: kept per cache, forgotten when the model's tensors move."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch

from qoqc.decode.buffers import Buffers
from qoqc.decode.inputs import StepInputs
from qoqc.decode.replay import Pool, Replayed
from qoqc.decode.select import Selection
from qoqc.runtime.kv_cache import KV4Cache

MAX_SELECTIONS = 16
"""Kinds of sampling remembered per cache: a server sees few, a sweep over temperatures many."""


class CacheSteps:
    """The forwards and token choices captured for one cache, and the buffers they work on."""

    def __init__(self, model: Any, cache: KV4Cache, pool: Pool | None) -> None:
        # weak: these steps are found by their cache, and must not keep it
        self._model, self._cache = weakref.ref(model), weakref.ref(cache)
        self._pool = pool
        layer = cache.layers[0]
        batch, device = layer.length.shape[0], layer.length.device
        # they outlive this generation, and the next may not run in inference mode
        with torch.inference_mode(False):
            self.buffers = Buffers(batch, cache.get_max_length(), device)
        self._forwards: dict[Hashable, Replayed] = {}
        self._selections: dict[Hashable, Replayed] = {}
        self._fixed: set[int] = set()

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [batch, vocabulary] after Buffers.token; appends it to the cache."""
        positions = inputs.position is not None
        key = (inputs.padded, positions, *sorted(inputs.arguments.items()))
        if key not in self._forwards:
            run = partial(self._run, inputs.padded, positions, inputs.arguments)
            self._forwards[key] = Replayed("the forward of a decode step", run, self._pool)
        forward = self._forwards[key]
        logits: torch.Tensor = forward()
        if forward.captured:
            self._fixed.add(logits.data_ptr())
        return logits

    def select(self, selection: Selection, logits: torch.Tensor, length: int) -> None:
        """Run `selection` on logits for sequences of `length` tokens."""
        # what a graph reads must stay where it is: only what another graph wrote does
        if logits.data_ptr() not in self._fixed:
            selection(logits, length)
            return
        key = (selection.key(length), logits.data_ptr())
        if key not in self._selections:
            while len(self._selections) >= MAX_SELECTIONS:
                self._selections.pop(next(iter(self._selections)))
            run = partial(selection, logits, length)
            self._selections[key] = Replayed("the choice of tokens", run, self._pool)
        self._selections[key]()

    def _run(self, padded: bool, positions: bool, arguments: dict[str, Any]) -> torch.Tensor:
        model, cache = self._model(), self._cache()
        assert model is not None and cache is not None
        if positions:
            arguments = {**arguments, "position_ids": self.buffers.position}
        outputs = model(
            input_ids=self.buffers.token,
            attention_mask=self.buffers.mask if padded else None,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **arguments,
        )
        logits: torch.Tensor = outputs.logits[:, -1]
        return logits


class Steps:
    """All captured steps of a model; `graphs` = capture at all (needs a GPU)."""

    def __init__(self, graphs: bool) -> None:
        self._graphs = graphs
        self._pool: Pool | None = None
        self._by_cache: weakref.WeakKeyDictionary[KV4Cache, CacheSteps]
        self._by_cache = weakref.WeakKeyDictionary()
        self._addresses: tuple[int, ...] = ()

    def of(self, model: Any, cache: KV4Cache) -> CacheSteps:
        """The steps for a cache; all are captured anew when a tensor of the model moved."""
        tensors = itertools.chain(model.parameters(), model.buffers())
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses != self._addresses:
            self._by_cache.clear()
            self._addresses = addresses
        if cache not in self._by_cache:
            if self._graphs and self._pool is None and model.device.type == "cuda":
                self._pool = Pool()
            self._by_cache[cache] = CacheSteps(model, cache, self._pool)
        return self._by_cache[cache]
