"""Sampling per request on an engine that takes the argmax: the right odds, the same every time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.ir.sampling import gumbel_noise
from qoqc.serve.http.sampling import (
    COLDEST,
    AtOnce,
    Gumbel,
    Nucleus,
    Sampling,
    Temperature,
    noise_key,
)


def rows(arguments: list[dict[str, Any]], position: int = 0) -> list[Any]:
    """A batch as processors see it: a row per request."""
    return [
        SimpleNamespace(state=SimpleNamespace(logit_processor_kwargs=a, position_offset=position))
        for a in arguments
    ]


def chosen(scores: torch.Tensor, arguments: list[dict[str, Any]], position: int = 0) -> list[int]:
    """The engine's tokens: every processor, then argmax."""
    for processor in (Temperature(), Nucleus(), Gumbel()):
        column = processor.prepare_tensor_args(rows(arguments, position))
        assert column.dtype == torch.int32 and column.shape == (len(arguments),)
        scores = processor(scores, column)
    return [int(token) for token in scores.argmax(-1)]


def draws(scores: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """How often each token is drawn by so many seeds, as shares."""
    arguments = [
        Sampling(sampling.temperature, sampling.top_p, seed).arguments(0) for seed in range(count)
    ]
    tokens = chosen(scores.expand(count, -1), arguments)
    return torch.bincount(torch.tensor(tokens), minlength=scores.shape[-1]) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_have_their_probabilities(temperature: float) -> None:
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 2
    count = 20_000
    share = draws(scores, Sampling(temperature), count)
    wanted = (scores[0] / temperature).softmax(-1)
    # five standard deviations of a binomial share: 1 in 2 million per token by chance, and the
    # seeds are fixed
    allowed = 5 * (wanted * (1 - wanted) / count).sqrt() + 1 / count
    assert ((share - wanted).abs() <= allowed).all()


def test_positions_draw_anew() -> None:
    scores = torch.zeros(1, 1000)
    arguments = [Sampling(1.0, seed=7).arguments(0)]
    tokens = [chosen(scores, arguments, position)[0] for position in range(200)]
    # 200 draws of 1000 tokens are some 181 different ones
    assert len(set(tokens)) > 160
    assert tokens == [chosen(scores, arguments, position)[0] for position in range(200)]


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
def test_nucleus_is_the_smallest_set(top_p: float) -> None:
    scores = torch.randn(8, 400, generator=torch.Generator().manual_seed(1)) * 4
    column = Nucleus().prepare_tensor_args(rows([{"top_p": top_p}] * 8))
    kept = Nucleus()(scores, column).isfinite()
    order = scores.argsort(-1, descending=True)
    probabilities = scores.softmax(-1).gather(-1, order)
    before = probabilities.cumsum(-1) - probabilities
    # the tokens of which the likelier ones have not yet reached top_p
    assert torch.equal(kept.gather(-1, order), before < top_p)


def test_greedy_rows_are_left_alone_bit_for_bit() -> None:
    scores = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    scores[0, 5] = scores[0, 9] = 9.0  # a tie: argmax takes the first
    arguments = [{}, Sampling(1.0, 0.5, 3).arguments(0), {}]
    out = scores
    for processor in (Temperature(), Nucleus(), Gumbel()):
        out = processor(out, processor.prepare_tensor_args(rows(arguments)))
    assert torch.equal(out[0::2], scores[0::2])
    assert not torch.equal(out[1], scores[1])
    assert Sampling(0.0, 0.5, 3).arguments(0) == Sampling(COLDEST / 2).arguments(0) == {}


def test_a_row_does_not_depend_on_the_others() -> None:
    scores = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    arguments = [Sampling(0.9, 0.8, seed).arguments(0) for seed in range(5)]
    together = chosen(scores, arguments, position=11)
    alone = [chosen(scores[i : i + 1], [arguments[i]], position=11)[0] for i in range(5)]
    assert together == alone


def test_padding_rows_have_neutral_numbers() -> None:
    scores = torch.randn(4, 64)
    for processor in (Temperature(), Nucleus(), Gumbel()):
        column = torch.empty(4, dtype=torch.int32)
        processor.fill_defaults(column)
        assert torch.equal(processor(scores, column), scores)


def test_noise_is_finite_and_keys_are_never_zero() -> None:
    keys = torch.tensor([[noise_key(seed, 0)] for seed in range(64)], dtype=torch.int32)
    noise = gumbel_noise(keys, torch.arange(200_000, dtype=torch.int32))
    assert noise.isfinite().all()
    # mean and deviation of the Gumbel distribution, each within five standard errors
    assert abs(noise.mean().item() - 0.57722) < 5 * 1.28255 / noise.numel() ** 0.5
    assert abs(noise.std().item() - 1.28255) < 0.005
    assert all(noise_key(seed, position) for seed in range(-50, 50) for position in range(50))


def test_the_list_does_at_once_what_its_processors_do() -> None:
    """With more columns than rows, as the engine's storage has them."""
    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(6)) * 3
    settings = (Sampling(), Sampling(0.7, 0.8, 1), Sampling(1.3, 1.0, 2), Sampling(1.0, 0.2, 3))
    batch = rows([setting.arguments(0) for setting in settings], position=5)
    processors = AtOnce()
    storage = torch.full((processors.tensors_required, 8), 7, dtype=torch.int32)
    processors.fill_defaults(storage)
    for request in batch:
        request.has_new_token = True
    columns = processors.prepare_tensor_args(batch, storage)
    want = scores
    for processor, column in zip(processors.logits_processor, columns, strict=True):
        want = processor(want, column)
    got = processors(None, scores, columns)
    assert torch.equal(got, want) and torch.equal(got[0], scores[0])
    assert not torch.equal(got[1:].argmax(-1), scores[1:].argmax(-1)) and got[1].isinf().any()
    processors.check_kwargs(settings[1].arguments(0))
    assert processors.do_processing


@pytest.mark.gpu
def test_a_cuda_graph_takes_new_numbers() -> None:
    """What is captured reads each step's temperatures and seeds, and draws what a CPU draws."""
    dispatch.install()
    scores = torch.randn(4, 1000, generator=torch.Generator().manual_seed(4))
    processors = AtOnce()
    columns = torch.empty(3, 4, dtype=torch.int32, device="cuda")
    processors.fill_defaults(columns)
    given = scores.cuda()

    def step() -> torch.Tensor:
        return processors(None, given, columns).argmax(-1)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = step()
    graph.replay()
    assert torch.equal(tokens.cpu(), scores.argmax(-1))
    for position in range(50):
        arguments = [{}, *(Sampling(0.9, 0.9, seed).arguments(0) for seed in range(3))]
        batch = rows(arguments, position)
        for request in batch:
            request.has_new_token = True
        processors.prepare_tensor_args(batch, columns)
        graph.replay()
        # logarithms differ in the last place, the two best tokens never that little
        assert tokens.tolist() == chosen(scores, arguments, position)


def test_random_seed_stands_in_for_none() -> None:
    assert Sampling(1.0).arguments(5) == {"temperature": 1.0, "top_p": 1.0, "seed": 5}
    assert Sampling(1.0, seed=0).arguments(5)["seed"] == 0
