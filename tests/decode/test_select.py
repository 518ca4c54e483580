"""The choice of tokens, function by function."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor

from qoqc.decode.select import bar, first_largest, piece_width


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 384, 1009, 50257, 128256])
def test_pieces_of_a_vocabulary(vocabulary: int) -> None:
    width = piece_width(vocabulary)
    assert vocabulary % width == 0
    assert width * width >= vocabulary
    assert not any(vocabulary % w == 0 for w in range(1, width) if w * w >= vocabulary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 384, 1009])
def test_first_largest_is_argmax(vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    scores = torch.randn(64, vocabulary, generator=generator).to(dtype)
    scores[1] = 0.0
    scores[2] = -torch.inf
    scores[3, vocabulary // 2] = torch.nan
    scores[4, vocabulary // 3 :] = torch.nan
    scores[5, [0, vocabulary // 2, -1]] = 50.0
    scores[6, vocabulary // 2] = torch.inf
    assert torch.equal(first_largest(scores), scores.argmax(-1))
    assert torch.equal(first_largest(scores), scores.float().argmax(-1))


@pytest.mark.parametrize("ends", [[3], list(range(3, 40)), [5, 5, 1000]])
def test_barred_tokens_are_those_of_transformers(ends: list[int]) -> None:
    scores = torch.randn(3, 384)
    processor = MinNewTokensLengthLogitsProcessor(4, 5, torch.tensor(ends))
    expected = processor(torch.zeros(3, 6, dtype=torch.long), scores)
    assert torch.equal(bar(scores, torch.tensor(ends)), expected)
    assert expected.isinf().any()
