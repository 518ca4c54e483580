from __future__ import annotations

import itertools
import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction, native_specialize_impl

from qoqc.codegen import dispatch, launcher
from qoqc.codegen.aot import Recorder
from qoqc.codegen.build import FAMILIES
from qoqc.codegen.kernels.few_call import FewSpec
from qoqc.codegen.launcher import Launcher, variant
from qoqc.ir.spec import AttentionSpec, KVSpec, LinearSpec
from qoqc.quant.activation import quantize_act
from qoqc.runtime.device import DeviceKey

H200 = DeviceKey("H200", 90, 132, 227 * 1024)


def described(dtype: torch.dtype, box: list[int], swizzle: int = 128) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle, dtype.itemsize * 8, 2)
    return TensorDescriptor(torch.zeros(64, 128, dtype=dtype), [64, 128], [128, 1], box, layout)


def values() -> list[Any]:
    """Arguments of every kind and around every border at which Triton may make another variant."""
    powers = [n + d for n in (2**31, 2**32, 2**63) for d in (-16, -1, 0, 1, 16)]
    x = torch.zeros(64)
    tensors = [x, x[4:], x[1:], x.half(), x.half()[1:], x.half()[8:], x.char(), x.int()]
    boxes = [
        described(torch.int8, [8, 128]),
        described(torch.int8, [16, 128]),
        described(torch.int8, [16, 128], 64),
        described(torch.uint8, [16, 128]),
    ]
    return [*range(-33, 34), *powers, -(2**31), -(2**31) - 1, 0.0, 1.0, 16.5, *tensors, *boxes]


def test_what_triton_tells_apart_is_told_apart() -> None:
    seen = [(native_specialize_impl(BaseBackend, x, False, True, True), x) for x in values()]
    kinds = {str(found) for found, _ in seen}
    assert len(kinds) > 15
    for (a, x), (b, y) in itertools.combinations(seen, 2):
        if a != b:
            assert variant((x,)) != variant((y,)), f"{x} is {a}, {y} is {b}"


def test_ordinary_numbers_share_few_variants() -> None:
    assert len({variant((n,)) for n in range(2, 10_000)}) == 2
    assert variant((torch.zeros(4),)) == variant((torch.zeros(9),))


@pytest.mark.parametrize("argument", [None, True, "x", torch.int8])
def test_an_argument_of_another_type_is_refused(argument: object) -> None:
    with pytest.raises(TypeError, match=f"a kernel takes no {type(argument).__name__}: "):
        variant((1, argument))


def hopper_specs() -> dict[str, Any]:
    linear = LinearSpec(256, 256, 128, torch.bfloat16, has_bias=True, has_residual=True)
    kv = KVSpec(2, 64, 64, 4)
    return {
        "gemm_hopper": linear,
        "few_linear": FewSpec(linear, None),
        "attention_hopper": AttentionSpec(4, kv, torch.bfloat16, causal=True),
    }


@pytest.mark.parametrize("name", sorted(hopper_specs().keys() & FAMILIES.keys()))
def test_what_is_never_interpreted_has_arguments_that_are_known(name: str) -> None:
    family, spec = FAMILIES[name], hopper_specs()[name]
    assert family.trial is not None
    recorder = Recorder(family.heuristic(spec, 1, H200))
    family.trial(spec, 1, torch.device("cpu"))(recorder)
    assert len(variant(recorder.arguments)) == len(recorder.arguments) > 0


def kernel(x, n):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    pass


def constexpr_kernel(x, n: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    pass


class Compiled(CompiledKernel):
    """A variant that keeps its launches."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launches.append((grid, args))


class Found(JITFunction):
    """A function whose variants Triton is asked for."""

    def __init__(self, fn: Any, gives: Any = None) -> None:
        super().__init__(fn)
        self.gives = gives or Compiled
        self.asked: list[Any] = []
        self.made: list[Compiled] = []

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        self.asked.append((grid, args, kwargs))
        self.made.append(self.gives())
        return self.made[-1]


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Which device is the current one, of a machine with two GPUs."""
    state = SimpleNamespace(device=0)
    active = SimpleNamespace(get_current_device=lambda: state.device)
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=active))
    return state


def test_triton_is_asked_once_for_like_arguments(current: SimpleNamespace) -> None:
    fn = Found(kernel)
    launch = Launcher(fn, {"num_warps": 8})
    x, y = torch.zeros(4), torch.ones(4)
    launch((3,), (x, 5))
    launch((4, 2), (y, 6))
    assert fn.asked == [((3,), (x, 5), {"num_warps": 8})]
    (compiled,) = fn.made
    assert compiled.launches == [((4, 2, 1), (y, 6))]


def test_triton_is_asked_for_each_variant_and_device(current: SimpleNamespace) -> None:
    fn = Found(kernel)
    launch = Launcher(fn, {})
    x = torch.zeros(8)
    kinds = [(x, 5), (x[1:], 5), (x, 1), (x, 16), (x.int(), 5)]
    for args in kinds * 2:
        launch((1,), args)
    assert [args for _, args, _ in fn.asked] == kinds
    assert [len(compiled.launches) for compiled in fn.made] == [1] * len(kinds)
    current.device = 1
    launch((1,), kinds[0])
    assert len(fn.asked) == len(kinds) + 1


@pytest.mark.parametrize("fn", [Found(constexpr_kernel), Found(kernel, gives=object)])
def test_what_cannot_be_kept_is_looked_up_every_time(fn: Found, current: SimpleNamespace) -> None:
    launch = Launcher(fn, {})
    for _ in range(3):
        launch((1,), (torch.zeros(8), 5))
    assert len(fn.asked) == 3


def test_threads_lose_no_launch(current: SimpleNamespace) -> None:
    fn = Found(kernel)
    launch = Launcher(fn, {})
    tensors = [torch.zeros(8, dtype=dtype) for dtype in (torch.half, torch.float, torch.int8)]

    def work() -> None:
        for turn in range(1000):
            launch((1,), (tensors[turn % 3], turn + 2))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launched = [args for compiled in fn.made for _, args in compiled.launches]
    launched += [args for _, args, _ in fn.asked]
    wanted = [(tensors[turn % 3].dtype, turn + 2) for turn in range(1000)] * 4
    assert Counter((x.dtype, n) for x, n in launched) == Counter(wanted)


@pytest.mark.gpu
def test_addresses_of_both_alignments_give_what_the_definition_gives(device: torch.device) -> None:
    whole = torch.randn(9, 4096, device=device).half().flatten()
    dispatch.install()
    for offset in (0, 1, 0, 1, 8, 3):
        x = whole[offset : offset + 4096 * 8].view(8, 4096)
        for got, want in zip(dispatch.quantize_act(x), quantize_act(x.cpu()), strict=True):
            assert torch.equal(got.cpu(), want)
