"""From scores to scores whose argmax is a draw: temperature, nucleus, Gumbel noise; per row.

The definition of qoqc::sample_scores. Nothing here reads values on the host, so CUDA graphs can
hold it. A row does not depend on the others.
"""

from __future__ import annotations

import torch

FLOOR = -30.0
"""Log probability, relative to the best token's, below which top_p < 1 keeps nothing: 1e-13."""

HALVINGS = 20
"""Steps of the search for the nucleus' threshold: 30 nats / 2**20 is below fp32's steps there."""


def sample_scores(
    scores: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    key: torch.Tensor | None,
    fill: float = -torch.inf,
) -> torch.Tensor:
    """scores / temperature, cut to the nucleus, plus noise; each only where its tensor is given.

    scores       fp32 [rows, vocabulary]
    temperature  fp32 [rows]
    top_p        fp32 [rows]; see `nucleus`
    key          int32 [rows]; a key of 0 adds nothing, see `gumbel_noise`
    fill         the score of tokens outside the nucleus

    Rows with temperature 1, top_p 1 and key 0 keep their values.
    """
    out = scores if temperature is None else scores / temperature[:, None]
    if top_p is not None:
        out = nucleus(out, top_p, fill)
    if key is not None:
        token = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
        out = out + torch.where(key[:, None] == 0, 0.0, gumbel_noise(key[:, None], token))
    # its own memory and neighbouring tokens, as every op's result has
    return out.clone(memory_format=torch.contiguous_format) if out is scores else out.contiguous()


def nucleus(scores: torch.Tensor, top_p: torch.Tensor, fill: float = -torch.inf) -> torch.Tensor:
    """`scores` [rows, vocabulary] with `fill` outside the likeliest tokens with probability top_p.

    The smallest set of a threshold: tokens within 3e-5 nats of each other stay or go together. Of
    top_p [rows] 1 and more keep all. The threshold is found by halving, which needs no sort. Rows
    with NaN, or without a finite score, stay as they are; inf leaves nothing but inf.
    """
    relative = scores - scores.amax(-1, keepdim=True)
    weights = relative.exp()
    enough = top_p[:, None] * weights.sum(-1, keepdim=True)
    low = torch.full_like(enough, FLOOR)
    high = torch.zeros_like(enough)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        kept = torch.where(relative >= middle, weights, 0).sum(-1, keepdim=True)
        low, high = (
            torch.where(kept >= enough, middle, low),
            torch.where(kept >= enough, high, middle),
        )
    # the best token stays even where top_p is below its own probability
    return scores.masked_fill((relative < low) & (top_p[:, None] < 1), fill)


def gumbel_noise(key: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, fp32, for int32 keys [rows, 1] and token ids [vocabulary].

    The bits are MurmurHash3's finalizer of key and id, twice; int32 products wrap, as they should.
    """
    bits = _mix(_mix(token * -1640531535) ^ key)  # 2**32 / golden ratio, odd
    # 31 bits: the smallest values of `uniform` are the largest noise, so they want fp32's precision
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def _mix(x: torch.Tensor) -> torch.Tensor:
    # >> of a negative int32 drags its sign along, the masks take it off
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * -2048144789  # 0x85EBCA6B
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * -1028477387  # 0xC2B2AE35
    return x ^ ((x >> 16) & 0xFFFF)
