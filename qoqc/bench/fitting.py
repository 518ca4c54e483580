"""The largest batch that is expected to fit into a GPU's memory."""

from __future__ import annotations

from typing import Any

import torch

from qoqc.bench.measure import System
from qoqc.decode.probe import probe_kv
from qoqc.decode.slices import rows_of
from qoqc.runtime.kv_cache import KV4Cache

PROBE = 8
"""Sequences whose prefill shows how much memory activations take."""

RESERVE = 0.08
"""Part of the memory left over: fragments, graphs, libraries' workspaces."""

STEP = 32
"""Batch sizes are multiples of it, if they are larger."""


def largest_batch(system: System, prompt: int, gen: int, fallback: int) -> int:
    """Sequences of `prompt` + `gen` tokens that fit; `fallback` on a CPU.

    Activations are taken from the peak of a small prefill: they grow with the batch, up to what
    qoqc's loop prefills at once.
    """
    device = system.device
    if device.type != "cuda":
        return fallback
    generate = system.generator(PROBE, prompt)
    generate(2)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    generate(2)
    activations = (torch.cuda.max_memory_allocated(device) - before) / PROBE
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    kept = kv_bytes(system.model) * (prompt + gen)
    sliced = getattr(system.model, "qoqc_loop", False)
    return fitting(
        free - RESERVE * total, activations, kept, at_once=rows_of(prompt) if sliced else None
    )


def fitting(room: float, activations: float, kept: float, *, at_once: int | None) -> int:
    """Sequences for which `room` bytes suffice; at least 1.

    activations  bytes of a sequence while prompts run
    kept         bytes of a sequence from then on
    at_once      sequences whose prompts run together; None = all
    """
    batch = int(room / (activations + kept))
    if at_once is not None:
        batch = max(batch, int((room - at_once * activations) / kept))
    return max(batch // STEP * STEP if batch >= STEP else batch, 1)


def kv_bytes(model: Any) -> int:
    """Bytes of one token in the cache generate() will use: qoqc's own, else keys and values."""
    specs = probe_kv(model)
    options = getattr(model, "qoqc_options", None)
    if options is None or options.kv_bits == 16:
        itemsize: int = model.dtype.itemsize
        return itemsize * sum(spec.kv_heads * (spec.k_dim + spec.v_dim) for spec in specs)
    cache = KV4Cache(model.config, 1, options.kv_layers or options.kv_bits)
    cache.allocate(1, specs, model.device, model.dtype)
    return cache.bytes_per_token()
