"""Sampling kernels against their definition: equal but for a threshold that rounding may move.

The kernel adds the weights of a row in another order than torch, and exp ends in other bits. So a
token may be kept by one and not by the other where the likelier tokens' probability is top_p within
`NEAR`, and nowhere else. Kept scores without noise are equal bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.kernels import sampling
from qoqc.codegen.kernels.sampling import SAMPLE, SampleSpec, call_of, heuristic, launch
from qoqc.codegen.specialize import source_of
from qoqc.ir.sampling import gumbel_noise, sample_scores
from qoqc.runtime.device import DeviceKey, device_key

NEAR = 1e-6
"""fp32 sums of some thousand weights, whose exp has an error of 2e-7 where they count."""

NOISE = {"rtol": 2e-6, "atol": 2e-6}
"""Two logarithms, each right to its last bits; the outer one of a number that has an error."""


def data(rows: int, vocabulary: int, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 7919 + vocabulary)
    return torch.randn(rows, vocabulary, generator=generator) * scale


def column(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def run(device: torch.device, *args: Any, fill: float = -math.inf) -> torch.Tensor:
    on = (x if x is None else x.to(device) for x in args)
    out: torch.Tensor = dispatch.sample_scores(*on, fill)
    assert out.is_contiguous() and out.device == args[0].to(device).device
    return out.cpu()


def borderline(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The tokens that rounding may keep or leave, [rows, vocabulary]: in fp64."""
    exact, order = scores.double().sort(-1, descending=True)
    share = exact.softmax(-1)
    before = share.cumsum(-1) - share
    near = (before - top_p[:, None]).abs() < NEAR
    # a threshold on the grid does not tell tokens apart that are nearer to each other than a step
    close = (exact - exact.gather(-1, near.int().argmax(-1, keepdim=True))).abs() < 4e-5
    near |= close & near.any(-1, keepdim=True)
    return torch.zeros_like(near).scatter(-1, order, near)


def assert_same(
    got: torch.Tensor, want: torch.Tensor, scaled: torch.Tensor, top_p: torch.Tensor | None
) -> None:
    """Equal to the definition but where `borderline` allows more or fewer tokens."""
    if top_p is not None:
        excused = (got != want) & borderline(scaled, top_p) & ((got == -torch.inf) | want.isinf())
        got = torch.where(excused, want, got)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("top_p", [0.0, 0.05, 0.3, 0.9, 0.999, 0.9999999])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 384, 1009])
def test_nucleus_of_the_definition(vocabulary: int, top_p: float, device: torch.device) -> None:
    scores = data(3, vocabulary)
    limit = column(top_p, top_p, 1.0)
    got = run(device, scores, None, limit, None)
    assert_same(got, sample_scores(scores, None, limit, None), scores, limit)
    assert got.isfinite().any(-1).all() and torch.equal(got[2], scores[2])


def test_all_three_at_once(device: torch.device) -> None:
    scores = data(4, 700)
    temperature, top_p = column(0.7, 1.0, 1.3, 2.0), column(0.9, 0.5, 1.0, 0.97)
    key = column(5, 0, -77, 2**31 - 1, dtype=torch.int32)
    quiet = run(device, scores, temperature, top_p, torch.zeros_like(key))
    want = sample_scores(scores, temperature, top_p, None)
    assert_same(quiet, want, scores / temperature[:, None], top_p)
    got = run(device, scores, temperature, top_p, key)
    noise = gumbel_noise(key[:, None], torch.arange(700, dtype=torch.int32))
    noise = torch.where(key[:, None] == 0, 0.0, noise)
    torch.testing.assert_close(got, quiet + noise, **NOISE)


@pytest.mark.parametrize("has", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 0)])
def test_what_is_not_given_is_left_out(has: tuple[int, ...], device: torch.device) -> None:
    scores = data(2, 300)
    every = (column(0.8, 1.5), column(0.8, 0.6), column(3, 4, dtype=torch.int32))
    given = [x if there else None for x, there in zip(every, has, strict=True)]
    got = run(device, scores, *given)
    torch.testing.assert_close(got, sample_scores(scores, *given), **NOISE)


def test_neutral_rows_keep_their_bits(device: torch.device) -> None:
    scores = data(3, 130)
    scores[0, 7] = -torch.inf
    got = run(device, scores, torch.ones(3), torch.ones(3), torch.zeros(3, dtype=torch.int32))
    assert torch.equal(got, scores)


def test_noise_is_that_of_the_definition(device: torch.device) -> None:
    key = column(1, -1, 2**31 - 1, -(2**31), 123456789, dtype=torch.int32)
    width = 4099
    got = run(device, torch.zeros(5, width), None, None, key)
    want = gumbel_noise(key[:, None], torch.arange(width, dtype=torch.int32))
    torch.testing.assert_close(got, want, **NOISE)


def test_special_rows(device: torch.device) -> None:
    scores = data(8, 200)
    scores[0, 5] = torch.nan
    scores[1] = -torch.inf
    scores[2] = 3.0
    scores[3, ::2] = -torch.inf
    scores[4, [3, 9]] = torch.inf
    scores[5] = torch.nan
    scores[6, 3], scores[6, 4] = torch.nan, torch.inf
    scores[7, 1:] = -100.0
    for top_p in (0.3, 0.9):
        limit = torch.full((8,), top_p)
        got, want = run(device, scores, None, limit, None), sample_scores(scores, None, limit, None)
        # row 2 has no border: its tokens stay together
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[2], scores[2]) and torch.equal(got[1], scores[1])


@pytest.mark.parametrize("part", [64, 256, 512])
def test_parts_of_any_width(part: int, device: torch.device) -> None:
    """Many parts, the last of them not full; and a row's bits whatever the batch."""
    scores, top_p = data(3, 1000), column(0.2, 0.8, 0.99)
    temperature, key = column(0.5, 0.9, 1.7), column(0, 0, 9, dtype=torch.int32)
    call = call_of(*(x.to(device) for x in (scores, temperature, top_p, key)), -torch.inf)
    tile = heuristic(call.spec, 3, device_key(device))
    narrow = dict(tile.constexprs) | {"PART": part, "COLUMNS": min(part, 128)}
    kernel = build(SAMPLE, call.spec, dataclasses.replace(tile, constexprs=tuple(narrow.items())))
    got = launch(kernel, call).cpu()
    scaled = scores / temperature[:, None]
    assert_same(got[:2], sample_scores(scores, temperature, top_p, None)[:2], scaled[:2], top_p[:2])
    alone = dataclasses.replace(
        call, scores=call.scores[1:2], temperature=call.temperature[1:2], top_p=call.top_p[1:2],
        key=call.key[1:2].clone(),
    )  # fmt: skip
    assert torch.equal(launch(kernel, alone).cpu(), got[1:2])


def test_strides_and_another_fill(device: torch.device) -> None:
    wide, top_p = data(6, 400), column(0.5, 0.5, 0.5)
    scores = wide[::2, ::2]
    pairs = torch.stack([top_p, top_p], 1).to(device)[:, 0]
    assert not pairs.is_contiguous()
    got = dispatch.sample_scores(wide.to(device)[::2, ::2], None, pairs, None, -7.5).cpu()
    want = sample_scores(scores, None, top_p, None, -7.5)
    assert torch.equal(got, want) and (want == -7.5).any()


def test_no_rows(device: torch.device) -> None:
    none = torch.empty(0, device=device)
    got = dispatch.sample_scores(torch.empty(0, 50, device=device), none, none, none.int(), 0.0)
    assert got.shape == (0, 50)


def test_tiles_do_not_depend_on_rows_and_hold_the_vocabulary() -> None:
    h200 = DeviceKey("H200", 90, 132, 227 * 1024)
    for vocabulary in (1, 3, 384, 8191, 8192, 8193, 128256, 262144):
        spec = SampleSpec(vocabulary, True, True, True)
        tiles = {heuristic(spec, rows, h200) for rows in (1, 64, 256, 8192)}
        assert len(tiles) == 1
        bound = sampling.bind(spec, tiles.pop())
        assert bound["PARTS"] * bound["PART"] >= vocabulary > (bound["PARTS"] - 1) * bound["PART"]


def test_the_search_ends_where_the_definition_does() -> None:
    steps, digit, depth = sampling.STEPS.value, sampling.DIGIT.value, sampling.DEPTH.value
    assert steps * digit == depth and sampling.SLOTS.value == 2**digit
    points = torch.arange(2**depth, dtype=torch.float32)
    grid = sampling.LOWEST.value + points * sampling.GRID.value
    exact = -30 + 30 * torch.arange(2**depth, dtype=torch.float64) / 2**depth
    assert torch.equal(grid.double(), exact)
    assert "mix(mix(token * -1640531535) ^ key)" in source_of(sampling.gumbel_noise)


@pytest.mark.parametrize(
    "spec", [SampleSpec(300, True, True, True), SampleSpec(50, has_key=True)], ids=["all", "noise"]
)
def test_a_generated_file_checks_itself(spec: SampleSpec, device: torch.device) -> None:
    kernel = build(SAMPLE, spec, heuristic(spec, 1, device_key(device)))
    command = [sys.executable, str(kernel.path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal to torch") >= 2


def test_what_it_does_not_take(device: torch.device) -> None:
    scores = torch.zeros(2, 8, device=device)
    two = torch.ones(2, device=device)
    with pytest.raises(ValueError, match="scores must be float32"):
        dispatch.sample_scores(scores.bfloat16(), None, two, None, 0.0)
    with pytest.raises(ValueError, match="with a vocabulary"):
        dispatch.sample_scores(scores[:, :0], None, two, None, 0.0)
    with pytest.raises(ValueError, match=r"top_p must be torch.float32 \[2\]"):
        dispatch.sample_scores(scores, None, two[:1], None, 0.0)
    with pytest.raises(ValueError, match="key must be torch.int32"):
        dispatch.sample_scores(scores, None, None, two, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 300])
@pytest.mark.parametrize("vocabulary", [128256, 50257])
def test_vocabularies_of_models(rows: int, vocabulary: int) -> None:
    device = torch.device("cuda")
    for scale in (1.0, 4.0):
        scores = data(rows, vocabulary, scale).to(device)
        temperature = torch.linspace(0.5, 1.5, rows, device=device)
        top_p = torch.linspace(0.9, 0.05, rows, device=device)
        want = sample_scores(scores, temperature, top_p, None)
        silent = torch.zeros(rows, dtype=torch.int32)
        got = run(device, scores, temperature, top_p, silent).to(device)
        assert_same(got, want, scores / temperature[:, None], top_p)
        assert got.isinf().any(-1).all() and got.isfinite().any(-1).all()


@pytest.mark.gpu
def test_a_graph_reads_new_numbers() -> None:
    scores = data(4, 32000).cuda()
    numbers = [torch.ones(4).cuda(), torch.ones(4).cuda(), torch.zeros(4).int().cuda()]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        dispatch.sample_scores(scores, *numbers, -math.inf)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dispatch.sample_scores(scores, *numbers, -math.inf)
    graph.replay()
    assert torch.equal(out, scores)
    for top_p in (0.9, 0.2):
        numbers[0].fill_(0.8)
        numbers[1].fill_(top_p)
        numbers[2].copy_(column(0, 1, 2, 3))
        graph.replay()
        assert torch.equal(out, dispatch.sample_scores(scores, *numbers, -math.inf))
        assert out.isinf().any() and not torch.equal(out, scores)
