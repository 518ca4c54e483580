"""How many bits a layer's keys and values need: the error they cause in its attention decides.

4 bits are safe for most layers and ruin some: Qwen2's first and last layers carry key biases a
hundred times the signal, which take the whole range of the 4-bit grid for themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from qoqc.errors import Unsupported
from qoqc.quant.kv import fake_quantize_kv

Bits = Literal[4, 8, 16]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

LIMIT = 0.4
"""Largest attention error (see attention_error) a layer may have. KV4 in small Llamas measures 0.11
to 0.33 once keys are smoothed, 0.44 where a key bias of 600 is left, and 1.2 to 1.7 with key
outliers of 30 times the rest that are not smoothed."""


@dataclasses.dataclass(frozen=True)
class KVChoice:
    """The bits of one layer, the errors measured, and why in words for the report."""

    name: str
    bits: Bits
    errors: Mapping[int, float]
    reason: str


def attention(
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = True,
    softcap: float | None = None,
) -> Attend:
    """Exact attention of q [B, Hq, S, D] over k [B, Hkv, L, D] and v [B, Hkv, L, Dv], in fp32.

    mask     bool (True = seen) or float (added), broadcastable to [B, Hq, S, L]
    causal   query i sees keys up to L - S + i; beside `mask`
    softcap  scores become softcap * tanh(score / softcap)
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
        scores = q.float() @ k.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None and mask.dtype is not torch.bool:
            scores = scores + mask
        elif mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(~seen.tril(scores.shape[-1] - scores.shape[-2]), -torch.inf)
        # a query that sees nothing gives zeros, as the kernels do
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        return F.softmax(scores, dim=-1).masked_fill(blind, 0.0) @ v

    return attend


def attention_error(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bits: int, attend: Attend
) -> float:
    """How far attention over rounded keys and values is off, relative to its exact output.

    q [B, Hq, S, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv], after the rotary embedding. The root of
    summed squared errors over summed squared outputs, for the query head where it is worst.
    """
    exact = attend(q, k, v).double()
    rounded = attend(q, fake_quantize_kv(k.float(), bits), fake_quantize_kv(v.float(), bits))
    noise = (rounded.double() - exact).square().sum((0, 2, 3))
    signal = exact.square().sum((0, 2, 3))
    ratio = torch.where(signal > 0, noise / signal.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return math.sqrt(float(ratio.amax()))


@torch.no_grad()
def choose_kv_bits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attend: Attend,
    name: str,
    *,
    limit: float = LIMIT,
    start: Bits = 4,
) -> KVChoice:
    """The fewest bits, from `start` on, that keep a layer's attention error within `limit`.

    q, k, v as for attention_error; attend: `attention(...)`, or the layer's own. 16 means that 8
    bits are too few as well. Raises Unsupported, naming the layer, for NaN or infinity.
    """
    for what, x in (("queries", q), ("keys", k), ("values", v)):
        if not torch.isfinite(x).all():
            raise Unsupported(f"{name}: the calibration {what} hold NaN or infinity")
    return fewest_bits(
        lambda bits: attention_error(q, k, v, bits, attend), name, limit=limit, start=start
    )


def fewest_bits(
    error: Callable[[int], float], name: str, *, limit: float = LIMIT, start: Bits = 4
) -> KVChoice:
    """The fewest bits, from `start` on, with `error(bits)` within `limit`; 16 if none are.

    error  the attention error, as attention_error defines it, however it is measured
    """
    candidates: tuple[Literal[4, 8], ...] = (4, 8)
    errors: dict[int, float] = {}
    for bits in candidates:
        if bits < start:
            continue
        errors[bits] = error(bits)
        if errors[bits] <= limit:
            return KVChoice(name, bits, errors, _reason(errors, limit))
    return KVChoice(name, 16, errors, _reason(errors, limit))


def spend_bits(choices: Sequence[KVChoice], average: float) -> tuple[KVChoice, ...]:
    """The choices with layers raised from 4 to 8 bits, the largest error first.

    As many as leave the mean of bits at most `average`; none where it is above that already. Of
    equal errors the earlier layer is raised.
    """
    total = sum(choice.bits for choice in choices)
    room = int((average * len(choices) - total) // 4)
    low = [i for i, choice in enumerate(choices) if choice.bits == 4]
    raised = sorted(low, key=lambda i: (-choices[i].errors[4], i))[: max(room, 0)]
    why = f"; among the {len(raised)} largest, raised to 8 bits within an average of {average:g}"
    return tuple(
        dataclasses.replace(choice, bits=8, reason=choice.reason + why) if i in raised else choice
        for i, choice in enumerate(choices)
    )


def _reason(errors: Mapping[int, float], limit: float) -> str:
    """`attention error 0.612 with KV4, 0.021 with KV8 (limit 0.4)`."""
    measured = ", ".join(f"{error:.3f} with KV{bits}" for bits, error in errors.items())
    return f"attention error {measured} (limit {limit:g})" if measured else "16 bits asked for"
