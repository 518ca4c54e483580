"""How many pages of keys and values fit into memory, counted in the bytes they really take."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch

from qoqc.errors import Unsupported
from qoqc.ir.spec import PAGE, KVSpec

WORD_BYTES = 4
"""Of the scale and the zero point that a vector of 4- or 8-bit codes has."""

MEMORY_FRACTION = {"cuda": 0.9, "cpu": 0.25}
"""Of the memory that is free next to the weights; a CPU's is everybody's."""

MANY_TOKENS = 1 << 17
"""The longest request of a model whose config names no greatest position."""


def page_bytes(spec: KVSpec) -> int:
    """Bytes of one page, 64 tokens, of a layer: as quant/kv.py `empty_pages` lays it out."""
    codes = (spec.k_dim + spec.v_dim) * spec.bits // 8
    return PAGE * spec.kv_heads * (codes + 2 * WORD_BYTES)


def block_bytes(specs: Sequence[KVSpec]) -> int:
    """Bytes of one page in all layers."""
    return sum(page_bytes(spec) for spec in specs)


def sixteen_bit_bytes(specs: Sequence[KVSpec]) -> int:
    """Bytes of 64 tokens in all layers of a cache in bf16, for comparison."""
    return sum(PAGE * spec.kv_heads * (spec.k_dim + spec.v_dim) * 2 for spec in specs)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine is asked to hold at most; None is decided by `resolve`.

    max_tokens_per_batch  tokens of one forward, decode rows and prefill chunks together
    max_requests          requests of one forward
    num_pages             pages of 64 tokens
    memory_fraction       of the free memory, if num_pages is not given
    request_tokens        the longest request, prompt and output; no more than the model's positions
    """

    max_tokens_per_batch: int | None = None
    max_requests: int | None = None
    num_pages: int | None = None
    memory_fraction: float | None = None
    request_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """`Limits` with every value decided.

    request_tokens  the longest request there can be, prompt and output
    """

    max_tokens_per_batch: int
    max_requests: int
    num_pages: int
    request_tokens: int

    @property
    def pages_per_request(self) -> int:
        """Of the longest request: the columns of a block table."""
        return -(-self.request_tokens // PAGE)


def resolve(
    limits: Limits, config: Any, specs: Sequence[KVSpec], device: torch.device, dtype: torch.dtype
) -> Sizes:
    """The sizes of an engine for a model of `config` (its text part), whose weights are loaded.

    Pages are as many as fit, but no more than `max_requests` of the longest requests could fill.
    Raises ValueError for sizes of 0 or less, and for a fraction above 1; Unsupported where not even
    one page fits.
    """
    for field in dataclasses.fields(limits):
        value = getattr(limits, field.name)
        if value is not None and value <= 0:
            raise ValueError(f"{field.name}={value}: expected more than 0")
    if (limits.memory_fraction or 0) > 1:
        raise ValueError(f"memory_fraction={limits.memory_fraction}: expected 1 or less")
    kind = device.type if device.type in MEMORY_FRACTION else "cpu"
    # two rows at least: a size of 1 is a shape of its own to torch.compile
    tokens = max(2, limits.max_tokens_per_batch or {"cuda": 8192, "cpu": 1024}[kind])
    requests = min(tokens, max(2, limits.max_requests or 256))
    longest = getattr(config, "max_position_embeddings", None) or MANY_TOKENS
    longest = min(longest, limits.request_tokens or longest)
    pages = limits.num_pages
    if pages is None:
        fraction = limits.memory_fraction or MEMORY_FRACTION[kind]
        room = int(free_bytes(device) * fraction) - activation_bytes(
            config, tokens, requests, dtype
        )
        pages = min(room // block_bytes(specs), requests * -(-longest // PAGE))
    if pages < 1:
        raise Unsupported(
            f"no memory is left for a page of the KV cache ({block_bytes(specs)} bytes): lower "
            f"max_tokens_per_batch ({tokens}) or max_requests ({requests})"
        )
    return Sizes(tokens, requests, pages, min(longest, pages * PAGE))


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that nothing uses yet."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def activation_bytes(config: Any, tokens: int, requests: int, dtype: torch.dtype) -> int:
    """About what a forward of `tokens` tokens with `requests` rows of logits takes at its peak.

    Around an MLP live the residual stream, its norm and sum, and the projections of width
    intermediate_size; logits are there in the model's dtype, in fp32 and as probabilities.
    """
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    per_token = dtype.itemsize * (8 * hidden + 2 * inner)
    per_row = config.vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize)
    return int(tokens * per_token + requests * per_row)
