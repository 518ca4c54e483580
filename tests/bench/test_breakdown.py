"""A decode step by kernel: groups, sums, time without any kernel, limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qoqc
from qoqc.bench.breakdown import (
    STEPS,
    Breakdown,
    Event,
    Launches,
    _summed,
    _union,
    group_of,
    measure_breakdown,
)
from qoqc.bench.limits import decode_limits
from qoqc.bench.measure import System
from qoqc.codegen.build import OPS
from qoqc.runtime.device import DeviceKey
from qoqc.testing import VOCAB, tiny_model

H200 = DeviceKey("NVIDIA H200", 90, 132, 232448)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("gemm_hopper_kernel", "w4a8_linear"),
        ("gemm_ways_kernel", "w4a8_linear"),
        ("norm_quantize_kernel", "norm_quantize"),
        ("triton_red_fused_add_mean_3", "inductor"),
        ("nvjet_tst_128x64_64x8_1x1_h_bz_TNT", "16-bit matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16>", "16-bit matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd>", "16-bit attention"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::reduce_kernel<512, 1>", "torch"),
    ],
)
def test_groups(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_every_kernel_of_ours_has_its_ops_group() -> None:
    for op in OPS.values():
        for form in op.forms:
            # a linear that quantizes its token itself is a linear
            group = "w4a8_linear" if op.name == "few_linear" else op.name
            assert group_of(form.template.fn.__name__) == group


def test_overlapping_kernels_count_once_in_the_busy_time() -> None:
    events = [Event("a", 0, 10), Event("b", 8, 12), Event("a", 20, 25), Event("c", 21, 22)]
    assert _union(events) == 17
    kernels = _summed(events)
    assert [(k.name, k.launches * STEPS, k.us * STEPS) for k in kernels] == [
        ("a", 2, 15),
        ("b", 1, 4),
        ("c", 1, 1),
    ]


def test_groups_add_up() -> None:
    kernels = (
        Launches("triton_a", "inductor", 2, 5.0),
        Launches("gemm", "16-bit matmul", 1, 9.0),
        Launches("triton_b", "inductor", 1, 6.0),
    )
    groups = Breakdown("qoqc", 1, 10, 20.0, kernels).groups()
    assert [(g.name, g.launches, g.us) for g in groups] == [
        ("inductor", 3, 11.0),
        ("16-bit matmul", 1, 9.0),
    ]


def test_only_decode_steps_are_looked_at() -> None:
    torch._dynamo.reset()
    model = tiny_model("llama")
    calls: list[int] = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].shape[1])
        with torch.profiler.record_function("a forward"):
            return forward(*args, **kwargs)

    model.forward = counted
    found = measure_breakdown(System("eager", model), batch=2, context=40)
    assert found.context == 40
    assert found.busy_us > 0
    (seen,) = [kernel for kernel in found.kernels if kernel.name == "a forward"]
    assert seen.launches == 1
    assert calls.count(28) == 2  # the prefills of the two generations


def test_limits_of_a_step() -> None:
    """Twice the batch needs no more weights; twice the context twice the cache."""
    torch._dynamo.reset()
    model = qoqc.compile(tiny_model("llama", torch.bfloat16), glue="eager")
    model.generate(torch.arange(3, 9)[None], max_new_tokens=2)
    one = decode_limits(model, 100, 1, 1000, H200)
    two = decode_limits(model, 100, 2, 1000, H200)
    assert set(one) == {"w4a8_linear", "step_attend", "attention_decode", "16-bit matmul"}
    assert one["step_attend"] == pytest.approx(1e6 * 100 * 1000 / 4.69e12)
    assert two["step_attend"] == pytest.approx(2 * one["step_attend"])
    assert one["w4a8_linear"] < two["w4a8_linear"] < 1.2 * one["w4a8_linear"]
    head = 2 * (VOCAB * 128 + VOCAB + 128)
    assert one["16-bit matmul"] == pytest.approx(1e6 * head / 4.69e12)
    packed = qoqc.compile(tiny_model("llama", torch.bfloat16), glue="eager", lm_head="w4a8")
    packed.generate(torch.arange(3, 9)[None], max_new_tokens=2)
    more = decode_limits(packed, 100, 1, 1000, H200)
    assert "16-bit matmul" not in more
    assert more["w4a8_linear"] > one["w4a8_linear"]
