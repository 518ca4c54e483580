from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import sympy
import torch

from qoqc.codegen.family import Family, Op, Tile, single
from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.codegen.kernels.gemm_plain import GEMM_PLAIN
from qoqc.codegen.roofline import Work
from qoqc.codegen.tuning.search import Timed, _agree, measure, search, shortlist, wrong
from qoqc.codegen.tuning.timing import COLD_BYTES, MAX_COPIES, copies_for
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import DeviceKey, device_key

H200 = DeviceKey("NVIDIA H200", 90, 132, 227 * 1024)


def test_results_come_fastest_first(
    op: Op, spec: Any, tiles: tuple[Tile, ...], device: torch.device, clock: Any
) -> None:
    timed = search(op, spec, 9, device, clock(4, 3, 1, 2))
    assert [t.us for t in timed] == [1, 2, 3, 4]
    assert timed[0].choice == (op.forms[0], tiles[2])


def test_forms_compete(
    op: Op, spec: Any, tiles: tuple[Tile, ...], device: torch.device, clock: Any
) -> None:
    second = dataclasses.replace(op.forms[0], name="second", candidates=lambda *_: tiles[:1])
    refusing = dataclasses.replace(second, name="third", refuses=lambda *_: "not here")
    three = dataclasses.replace(op, forms=(*op.forms, second, refusing))
    timed = search(three, spec, 9, device, clock(4, 3, 5, 2, 1))
    assert timed[0].choice == (second, tiles[0])
    assert len(timed) == 5


def spoilt(family: Family, wrong_tiles: tuple[Tile, ...]) -> Family:
    """The family with kernels of some tiles that get one element wrong."""
    assert family.trial is not None
    genuine = family.trial

    def trial(*args: Any) -> Any:
        run = genuine(*args)

        def spoil(kernel: Any) -> tuple[torch.Tensor, ...]:
            xq, scale, total = run(kernel)
            if kernel.tile in wrong_tiles:
                xq[0, 0] ^= 1
            return xq, scale, total

        return spoil

    return dataclasses.replace(family, trial=trial)


def test_a_wrong_candidate_cannot_win(
    family: Family,
    spec: Any,
    tiles: tuple[Tile, ...],
    device: torch.device,
    clock: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    op = single(spoilt(family, tiles[1:2]))
    with caplog.at_level(logging.WARNING, logger="qoqc"):
        assert search(op, spec, 9, device, clock(4, 3, 2))[0].choice[1] == tiles[3]
    assert "gives other results" in caplog.text


def test_gemms_are_compared_with_the_definition_not_with_each_other(
    device: torch.device, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LinearSpec(256, 64, 128, torch.bfloat16)
    start = GEMM_PLAIN.start
    assert start is not None
    genuine = GEMM_PLAIN.trial
    assert genuine is not None

    def off_by_one(spec: LinearSpec, size: int, device: torch.device) -> Any:
        trial: Any = genuine(spec, size, device)
        run = trial._start

        def spoil(kernel: Any, call: Any, y: torch.Tensor) -> None:
            run(kernel, call, y)
            y[-1, -1] += 1

        trial._start = spoil
        return trial

    form = dataclasses.replace(GEMM_PLAIN, trial=off_by_one)
    tile = form.heuristic(spec, 2, device_key(device))
    # every candidate is wrong in the same way, the heuristic's too
    assert wrong((form, tile), spec, 2, device) == "it gives other results"
    assert wrong((GEMM_PLAIN, tile), spec, 2, device) is None
    one = dataclasses.replace(form, candidates=lambda *_: (tile,))
    op = dataclasses.replace(GEMM, forms=(one,), heuristic=lambda *_: (one, tile))
    (answer,) = search(op, spec, 2, device, clock())
    assert answer.choice == (one, tile)
    assert answer.us == float("inf")


def test_a_race_that_spares_the_first_run_is_found(device: torch.device, clock: Any) -> None:
    spec = LinearSpec(256, 64, 128, torch.bfloat16)
    genuine = GEMM_PLAIN.trial
    assert genuine is not None

    def racing(spec: LinearSpec, size: int, device: torch.device) -> Any:
        trial: Any = genuine(spec, size, device)
        run, runs = trial._start, []

        def race(kernel: Any, call: Any, y: torch.Tensor) -> None:
            run(kernel, call, y)
            runs.append(1)
            y[0, 0] += len(runs) > 2

        trial._start = race
        return trial

    choice = (GEMM_PLAIN, GEMM_PLAIN.heuristic(spec, 2, device_key(device)))
    racy = (dataclasses.replace(GEMM_PLAIN, trial=racing), choice[1])
    assert measure(racy, spec, 2, device, clock(1)) == "it gave other results while it was timed"
    assert measure(choice, spec, 2, device, clock(1)) == Timed(choice, 1)


def test_a_result_that_is_not_written_is_wrong(device: torch.device) -> None:
    spec = LinearSpec(256, 64, 128, torch.bfloat16)
    genuine = GEMM_PLAIN.trial
    assert genuine is not None
    kept: list[Any] = []

    def lazy(spec: LinearSpec, size: int, device: torch.device) -> Any:
        trial: Any = genuine(spec, size, device)
        trial._y.copy_(trial.expected()[0])  # what an earlier candidate left
        trial._start = lambda *_: None
        kept.append(trial)
        return trial

    form = dataclasses.replace(GEMM_PLAIN, trial=lazy)
    tile = form.heuristic(spec, 2, device_key(device))
    assert wrong((form, tile), spec, 2, device) == "it gives other results"
    assert kept


def test_weights_of_a_gemm_are_rotated(device: torch.device, clock: Any) -> None:
    spec = LinearSpec(2048, 1024, 128, torch.bfloat16)
    tile = GEMM_PLAIN.heuristic(spec, 1, device_key(device))
    one = dataclasses.replace(GEMM_PLAIN, candidates=lambda *_: (tile,))
    op = dataclasses.replace(GEMM, forms=(one,), heuristic=lambda *_: (one, tile))
    watch = clock(1)
    search(op, spec, 1, device, watch)
    weights = 2048 * 1024 // 2 + 4 * 1024 * (2048 // 128 + 1)
    assert watch.copies == [-(-COLD_BYTES // weights)]


def test_copies() -> None:
    assert copies_for(COLD_BYTES) == 1
    assert copies_for(COLD_BYTES - 1) == 2
    assert copies_for(2048 * 768 // 2) == 255
    assert copies_for(1) == copies_for(0) == MAX_COPIES


def test_a_candidate_that_fails_is_dropped(
    family: Family,
    spec: Any,
    tiles: tuple[Tile, ...],
    device: torch.device,
    clock: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = (("ROWS", 3), ("BLOCK_K", 64), ("LOOP", 0), ("DEPENDENT", 0))
    broken = Tile(wrong, num_warps=1)  # not a power of two
    family = dataclasses.replace(family, candidates=lambda *_: (tiles[0], broken, tiles[1]))
    with caplog.at_level(logging.WARNING, logger="qoqc"):
        timed = search(single(family), spec, 9, device, clock(2, 1))
    assert timed[0].choice == (family, tiles[1])
    assert "is not considered: it failed" in caplog.text


def test_excluded_candidates_are_not_run(
    op: Op, spec: Any, tiles: tuple[Tile, ...], device: torch.device, clock: Any
) -> None:
    excluded = {(op.forms[0], tiles[0]), (op.forms[0], tiles[2])}
    timed = search(op, spec, 9, device, clock(2, 1), excluded=excluded)
    assert [t.choice[1] for t in timed] == [tiles[3], tiles[1]]


def test_a_family_without_a_trial_keeps_its_heuristic(
    family: Family, spec: Any, tiles: tuple[Tile, ...], device: torch.device, clock: Any
) -> None:
    mute = single(dataclasses.replace(family, trial=None))
    assert search(mute, spec, 9, device, clock())[0].choice[1] == tiles[0]


def test_candidates_beyond_shared_memory_are_not_run(
    family: Family, spec: Any, tiles: tuple[Tile, ...]
) -> None:
    greedy = dataclasses.replace(
        family, shared_bytes=lambda spec, tile: 0 if tile == tiles[1] else 1 << 30
    )
    # the heuristic's is always run
    assert [tile for _, tile in shortlist(single(greedy), spec, 9, H200)] == list(tiles[:2])


def test_candidates_with_twice_the_work_are_not_run(
    family: Family, spec: Any, tiles: tuple[Tile, ...]
) -> None:
    seconds = dict(zip(tiles, (9.0, 2.1, 1.9, 1.0), strict=True))

    def work(spec: Any, tile: Tile, device: DeviceKey) -> Work:
        gigabytes = sympy.Float(seconds[tile] * 1e9)
        return Work(gigabytes, sympy.Integer(0), sympy.Integer(0), sympy.Integer(132))

    op = single(dataclasses.replace(family, work=work))
    assert [tile for _, tile in shortlist(op, spec, 9, H200)] == [tiles[0], tiles[3], tiles[2]]


@pytest.mark.parametrize("size", [1, 16, 64, 256, 1024, 8192])
def test_the_shortlist_of_a_gemm(size: int) -> None:
    spec = LinearSpec(4096, 6144, 128, torch.bfloat16)
    kept = shortlist(GEMM, spec, size, H200)
    everything = sum(len(form.candidates(spec, size, H200)) for form in GEMM.usable(spec, H200))
    assert kept[0] == GEMM.heuristic(spec, size, H200)
    assert len(kept) == len(set(kept))
    assert 1 < len(kept) <= everything


def test_agree() -> None:
    a = torch.tensor([1.0, -4.0])
    assert not _agree(a, a + 1e-3, 0.0)
    assert _agree(a, a + 1e-3, 1e-3)
    assert not _agree(a, a + 5e-3, 1e-3)
    assert _agree(torch.tensor(torch.nan), torch.tensor(torch.nan), 0.0)
    assert not _agree(a, torch.cat((a, a)), 0.0)
    assert not _agree(a, a.double(), 0.0)
