"""The choice of tokens, function by function."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    TopPLogitsWarper,
)

from qoqc.codegen import dispatch
from qoqc.decode.select import bar, first_largest, nucleus, piece_width


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


@pytest.mark.parametrize("least", [1, 5, 1000])
@pytest.mark.parametrize("fill", [-torch.inf, -5.0])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.7, 0.95])
def test_the_nucleus_is_that_of_transformers(
    top_p: float, fill: float, least: int, device: torch.device
) -> None:
    dispatch.install()  # the kernel, where there is a GPU
    scores = torch.randn(6, 384, generator=torch.Generator().manual_seed(5)) * 3
    scores[1, 100:] = -torch.inf
    processor = TopPLogitsWarper(top_p, fill, least)
    want = processor(torch.zeros(6, 1, dtype=torch.long), scores)
    got = nucleus(scores.to(device), processor).cpu()
    assert torch.equal(got, want)


def test_tokens_with_equal_scores_stay_together(device: torch.device) -> None:
    scores = torch.full((1, 64), -20.0)
    scores[0, [3, 7, 11, 40]] = 1.0
    kept = nucleus(scores.to(device), TopPLogitsWarper(0.6)).cpu()
    assert kept[0].isfinite().nonzero().flatten().tolist() == [3, 7, 11, 40]
    # a sort tells them apart by nothing but their places
    assert TopPLogitsWarper(0.6)(torch.zeros(1, 1), scores).isfinite().sum() == 3


@pytest.mark.gpu
def test_a_nucleus_on_a_gpu_sorts_nothing() -> None:
    dispatch.install()
    scores = torch.randn(2, 1000, device="cuda")
    processor = TopPLogitsWarper(0.8)
    nucleus(scores, processor)  # compiles it
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        nucleus(scores, processor)
        torch.cuda.synchronize()
    kinds = {event.name for event in profile.events() if event.device_type.name == "CUDA"}
    assert "sample_kernel" in kinds and not any("sort" in kind.lower() for kind in kinds), kinds
