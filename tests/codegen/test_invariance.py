"""Tokens computed together have the bits they have alone, where that is asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import OPS
from qoqc.codegen.invariance import invariant, size_for
from qoqc.codegen.kernels.norm_call import NormSpec, random_call
from qoqc.codegen.tuning.choose import BUCKETS, known
from qoqc.runtime.device import DeviceKey

H200 = DeviceKey("H200", 90, 132, 227 * 1024)
LLAMA = NormSpec(4096, torch.bfloat16, round_first=True, has_residual=True)


def test_sums_of_floats_have_one_tile_for_all_sizes() -> None:
    op = OPS["norm_quantize"]
    assert len({known(op, LLAMA, size, H200)[1] for size in BUCKETS}) > 1
    with invariant():
        assert len({known(op, LLAMA, size_for(op, size), H200)[1] for size in BUCKETS}) == 1
    assert [size_for(op, size) for size in BUCKETS] == list(BUCKETS)


def test_integers_keep_the_fastest_tile() -> None:
    with invariant():
        assert size_for(OPS["w4a8_linear"], 3) == 3
        assert size_for(OPS["quantize"], 3) == 3


def test_other_threads_are_left_alone() -> None:
    found = []
    with invariant():
        thread = threading.Thread(target=lambda: found.append(size_for(OPS["norm_quantize"], 3)))
        thread.start()
        thread.join()
    assert found == [3]


@pytest.mark.gpu
@pytest.mark.parametrize("features", [256, 4096, 5120])
def test_norms_on_a_gpu(features: int) -> None:
    spec = NormSpec(features, torch.bfloat16, round_first=True, has_residual=True)
    call = random_call(spec, 700, torch.device("cuda"))
    residual = call.residual
    assert residual is not None

    def norm(tokens: int) -> tuple[torch.Tensor, ...]:
        return dispatch.norm_quant(
            call.x[:tokens], residual[:tokens], call.weight, call.bias,
            spec.kind, spec.eps, spec.offset, spec.round_first, spec.keep,
        )  # fmt: skip

    with invariant():
        together = norm(700)
        for tokens in (1, 2, 7, 66, 100, 132, 264, 265, 530, 699):
            for alone, of_all in zip(norm(tokens), together, strict=True):
                assert torch.equal(alone, of_all[:tokens]), tokens
