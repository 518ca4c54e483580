"""What a step is made of, on the host: which tokens of the row are whose, and their pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from qoqc.codegen.tuning.choose import BUCKETS
from qoqc.ir.spec import PAGE

WARM_TOKENS = 17
"""Of a prompt that compiles a graph: not as many as the rows of logits of one request."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The share of one request in a step.

    blocks  its pages, first to last; at least those of all its tokens so far and of the new ones
    start   tokens it has in them already
    count   new tokens, the next `count` of the row
    """

    blocks: Sequence[int]
    start: int
    count: int

    @property
    def stop(self) -> int:
        """Tokens it has after the step."""
        return self.start + self.count

    @property
    def pages(self) -> int:
        """How many of its pages the step reads."""
        return -(-self.stop // PAGE)


def leading_singles(works: Sequence[Work]) -> int:
    """How many requests in front have one new token each."""
    for number, work in enumerate(works):
        if work.count != 1:
            return number
    return len(works)


def warm_sizes(most: int, device: torch.device) -> list[int]:
    """The tokens of steps with prompts, `most` at most, that leave nothing to compile for others.

    On a GPU tiles are chosen by the next power of two, and kernels compiled apart for numbers of
    tokens that are no multiple of 16.
    """
    if device.type != "cuda":
        return [min(WARM_TOKENS, most)]
    sizes = {size for bucket in BUCKETS for size in (bucket - 1, bucket)} | {most - 1, most}
    return sorted(size for size in sizes if 2 <= size <= most)
