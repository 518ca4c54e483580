from __future__ import annotations

import builtins
import time

import pytest
import torch

from qoqc.codegen.kernels.gemm_plain import GEMM_PLAIN, heuristic
from qoqc.codegen.tuning.proving import failures
from qoqc.codegen.tuning.search import Candidate, prove
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import device_key

# tasks as Python text: a check must be importable by name in the worker
CHECK = builtins.eval


def test_every_task_is_answered() -> None:
    tasks = ["None", "'wrong'", "1 / 0", "__import__('os')._exit(7)", "None", "'odd'"]
    found = failures(CHECK, tasks, workers=2, timeout_s=60)
    assert set(found) == {1, 2, 3, 5}
    assert found[1] == "wrong"
    assert "ZeroDivisionError" in found[2]
    assert found[3] == "its process died, exit code 7"


def test_a_hung_task_ends() -> None:
    started = time.monotonic()
    found = failures(CHECK, ["__import__('time').sleep(600)", "None"], workers=1, timeout_s=1)
    assert found == {0: "no answer within 1 s"}
    assert time.monotonic() - started < 300


def test_no_task_is_begun_after_the_budget() -> None:
    found = failures(CHECK, ["None", "None"], workers=1, timeout_s=60, budget_s=-1)
    assert found == dict.fromkeys((0, 1), "there was no time left to try it")


def test_no_tasks_start_no_worker() -> None:
    assert failures(CHECK, [], workers=4, timeout_s=1) == {}


def test_a_check_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle|local"):
        failures(lambda task: None, ["None"], workers=1, timeout_s=60)


def test_a_candidate_is_proven_for_all_its_sizes(device: torch.device) -> None:
    spec = LinearSpec(256, 64, 128, torch.bfloat16)
    tile = heuristic(spec, 2, device_key(device))
    good = Candidate(GEMM_PLAIN.name, tile, spec, (1, 2), device.type)
    assert prove(good) is None
    broken = {**dict(tile.constexprs), "BLOCK_M": 24}  # not a power of two
    bad = type(tile)(tuple(broken.items()), tile.num_warps, tile.num_stages)
    reason = prove(Candidate(GEMM_PLAIN.name, bad, spec, (1,), device.type))
    assert reason is not None
    assert reason.startswith("with 1 tokens it failed")
