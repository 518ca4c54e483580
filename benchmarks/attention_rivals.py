"""torch's bf16 attentions, as benchmarks/attention.py times them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attention_calls import DIM, HEADS, KV_HEADS, Point, Row, backend, fits
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from qoqc.codegen.tuning.timing import copies_for, timer_for


def sdpa(name: str, point: Point, device: torch.device) -> Callable[..., torch.Tensor]:
    """SDPA on one backend."""
    causal = point.kind == "prefill"

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with backend(name, device):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return attend


def flex(name: str, point: Point, device: torch.device) -> Callable[..., torch.Tensor]:
    """flex_attention with a causal block mask for prompts."""

    def causal(b: Any, h: Any, query: Any, key: Any) -> Any:
        return query >= key

    sizes = (point.new, point.context)
    mask = None
    if point.kind == "prefill":
        mask = create_block_mask(causal, None, None, *sizes, device=device.type)
    # a cache of its own for each point: beyond 8 shapes Dynamo would run the slow definition
    torch._dynamo.reset()
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask, enable_gqa=True)


RIVALS = {"cudnn": sdpa, "flash": sdpa, "flex": flex}


def rival_row(name: str, point: Point, device: torch.device) -> Row:
    """A rival's time; one that does not run here has no time but a note."""
    row: Row = {"what": name, "us": math.nan, "note": ""}
    one = 2 * point.batch * KV_HEADS * point.context * DIM * 2
    copies = copies_for(one)
    if not fits(point, copies * one, device):
        return {**row, "note": f"no room for {one / 1e9:.0f} GB of bf16 cache"}

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    q = randn(point.batch, HEADS, point.new, DIM)
    caches = [
        [randn(point.batch, KV_HEADS, point.context, DIM) for _ in range(2)] for _ in range(copies)
    ]
    try:
        attend = RIVALS[name](name, point, device)
        row["us"] = timer_for(device)(lambda copy: attend(q, *caches[copy]), copies)
    except Exception as error:  # a rival may fail in any way; ours may not
        row["note"] = f"not available: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return row
