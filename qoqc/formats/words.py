"""4-bit values eight to an int32 word, as AWQ, GPTQ and compressed-tensors store them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PER_WORD = 8
NATURAL = tuple(range(PER_WORD))


def unpack_words(
    words: torch.Tensor, dim: int, order: Sequence[int] = NATURAL, size: int | None = None
) -> torch.Tensor:
    """int32 words as uint8 values 0..15, eight times as many along `dim`, or `size` of them.

    order  which of a word's eight neighbours lies in its bits 4*i to 4*i + 3
    """
    last = words.movedim(dim, -1)
    values = last.new_empty(*last.shape, PER_WORD, dtype=torch.uint8)
    for nibble, neighbour in enumerate(order):
        # & 15 also removes the sign that an arithmetic shift drags in
        values[..., neighbour] = (last >> (4 * nibble)) & 15
    return values.flatten(-2)[..., :size].movedim(-1, dim).contiguous()
