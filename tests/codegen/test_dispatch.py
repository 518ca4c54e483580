from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import OPS
from qoqc.codegen.family import Op, single
from qoqc.codegen.kernels import few_call, few_trial
from qoqc.codegen.kernels.norm_quantize import TOLERANCE
from qoqc.codegen.kernels.quantize import QUANTIZE, QuantizeSpec
from qoqc.codegen.tuning import choose as choosing
from qoqc.ir import ops
from qoqc.quant.activation import quantize_act
from qoqc.quant.weight import quantize_weight
from qoqc.runtime.device import device_key


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_KERNELS", {})
    mode = dispatch._MODE
    yield
    dispatch.install(mode)


def test_install_registers_cuda_implementations_once(fresh: None) -> None:
    dispatch.install()
    (library,) = dispatch._INSTALLED
    dispatch.install()
    assert len(dispatch._INSTALLED) == 1
    assert dispatch._INSTALLED[0] is library
    for name in dispatch.IMPLEMENTATIONS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qoqc::{name}", "CUDA")
    assert set(dispatch.IMPLEMENTATIONS) <= set(ops.SCHEMAS)


def test_cpu_tensors_keep_the_reference(fresh: None) -> None:
    dispatch.install()
    x = torch.randn(2, 32)
    for a, b in zip(ops.quantize_act(x), quantize_act(x), strict=True):
        assert torch.equal(a, b)
    assert dispatch._KERNELS == {}


def test_a_kernel_is_chosen_once_per_spec_bucket_and_device(
    fresh: None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    asked: list[int] = []
    genuine = choosing.choose

    def choose(op, spec, size, device, mode):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        asked.append(size)
        return genuine(op, spec, size, device, mode)

    monkeypatch.setattr(choosing, "choose", choose)
    for tokens in (3, 4, 5, 8, 3):
        dispatch.quantize_act(torch.randn(tokens, 24, device=device))
    assert asked == [3, 5]


def test_kernels_built_after_install_are_dumped(
    fresh: None, monkeypatch: pytest.MonkeyPatch, device: torch.device, tmp_path: Path
) -> None:
    monkeypatch.setattr(dispatch, "_DUMP", None)
    dispatch.install(dump=str(tmp_path))
    before = set((tmp_path / "kernels").glob("*"))
    dispatch.install()  # a later graph without a dump does not end the first one's
    dispatch.quantize_act(torch.randn(3, 56, device=device))
    (kernel,) = dispatch._KERNELS.values()
    written = tmp_path / "kernels" / kernel.path.name
    assert written not in before
    assert written.read_text() == kernel.source


def test_another_mode_chooses_again(
    fresh: None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    asked: list[choosing.Mode] = []

    def choose(op, spec, size, device, mode):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        asked.append(mode)
        return op.heuristic(spec, size, device_key(device))

    monkeypatch.setattr(choosing, "choose", choose)
    spec = QuantizeSpec(24, torch.float32)
    for mode in ("heuristic", "search"):
        dispatch.install(mode)
        dispatch.kernel_for(OPS["quantize"], spec, 1, device)
        dispatch.kernel_for(OPS["quantize"], spec, 1, device)
    assert asked == ["heuristic", "search"]


class FewLinear:
    """Stands in for the kernel of few tokens: does by its definition what it is launched for."""

    def __init__(self, patch: pytest.MonkeyPatch, refusal: str | None = None) -> None:
        self.launched: list[tuple[str, int]] = []
        self._genuine = dispatch.kernel_for
        form = dataclasses.replace(QUANTIZE, name=few_call.OP, refuses=lambda spec, key: refusal)
        patch.setitem(OPS, few_call.OP, single(form))
        patch.setattr(dispatch, "kernel_for", self._kernel_for)
        dispatch._runs.cache_clear()

    def _kernel_for(self, op: Op, spec: Any, size: int, device: torch.device) -> Any:
        self.launched.append((op.name, size))
        if op.name != few_call.OP:
            return self._genuine(op, spec, size, device)
        return SimpleNamespace(family=SimpleNamespace(start=self._start))

    @staticmethod
    def _start(kernel: Any, call: few_call.FewCall, outputs: few_call.Outputs) -> None:
        flat = dataclasses.replace(
            call,
            x=call.rows(call.x),
            norm_residual=None if call.norm_residual is None else call.rows(call.norm_residual),
        )
        for output, want in zip(outputs, few_trial.definition(flat), strict=True):
            output.copy_(want.view_as(output))


@pytest.fixture
def few(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FewLinear]:
    yield FewLinear(monkeypatch)
    dispatch._runs.cache_clear()


def composite(tokens: int, device: torch.device, *, normed: bool, glu: bool = False) -> list[Any]:
    """Arguments of norm_linear or quant_linear for `tokens` tokens of fp16."""
    torch.manual_seed(tokens)
    packed = quantize_weight(torch.randn(32, 128, device=device), 128)
    x, residual = torch.randn(2, 1, tokens, 128, device=device).half()
    weight = torch.randn(128, device=device).half()
    norm = (residual, weight, None, "rms", 1e-6, 0.0, False, True) if normed else ()
    tensors = (packed.qweight, packed.channel_scale, packed.group_word, None)
    return [x, *norm, *tensors, None, None, torch.float16, glu]


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_few_tokens_take_one_launch_and_more_take_two(
    few: FewLinear, device: torch.device, normed: bool, glu: bool
) -> None:
    run = dispatch.norm_linear if normed else dispatch.quant_linear
    op = ops.norm_linear if normed else ops.quant_linear
    for tokens in (1, few_call.MAX_TOKENS, few_call.MAX_TOKENS + 1, 0):
        arguments = composite(tokens, device, normed=normed, glu=glu)
        got = run(*arguments)
        want = op(*[x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments])
        results: Any = zip(got, want, strict=True) if normed else [(got, want)]
        for a, b in results:
            # the norm adds up its squares in another order, SiLU has another exp
            atol = TOLERANCE * float(b.abs().max()) if normed and b.numel() else 0.0
            torch.testing.assert_close(a.cpu(), b, rtol=2**-8, atol=atol)
    apart = ["norm_quantize" if normed else "quantize", "w4a8_linear"]
    assert few.launched == [
        (few_call.OP, 1),
        (few_call.OP, few_call.MAX_TOKENS),
        *((name, few_call.MAX_TOKENS + 1) for name in apart),
        *((name, 0) for name in apart),
    ]


def test_what_the_kernel_of_few_tokens_refuses_takes_two_launches(
    few: FewLinear, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    refusing = FewLinear(monkeypatch, refusal="not here")
    dispatch.quant_linear(*composite(1, device, normed=False))
    assert [name for name, _ in refusing.launched] == ["quantize", "w4a8_linear"]


def test_another_dtype_than_the_results_takes_two_launches(
    few: FewLinear, device: torch.device
) -> None:
    x, *rest, _, glu = composite(1, device, normed=False)
    y = dispatch.quant_linear(x, *rest, torch.float32, glu)
    assert y.dtype == torch.float32
    assert [name for name, _ in few.launched] == ["quantize", "w4a8_linear"]


@pytest.mark.parametrize("tokens", [1, few_call.MAX_TOKENS + 1])
def test_glu_takes_no_residual(few: FewLinear, device: torch.device, tokens: int) -> None:
    x, *tensors, _, dtype, _ = composite(tokens, device, normed=False)
    with pytest.raises(ValueError, match="no residual"):
        dispatch.quant_linear(x, *tensors, x[..., :32], dtype, True)


def test_a_cpu_without_the_interpreter_is_refused(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="quantize: the kernel needs a CUDA device, got cpu"):
        dispatch.quantize_act(torch.randn(1, 8))


@pytest.mark.gpu
def test_ops_run_kernels_under_a_cuda_graph(fresh: None, device: torch.device) -> None:
    dispatch.install()
    packed = quantize_weight(torch.randn(256, 512, device=device), 128)
    x = torch.randn(4, 512, device=device, dtype=torch.bfloat16)

    def layer() -> torch.Tensor:
        y: torch.Tensor = ops.w4a8_linear(
            *ops.quantize_act(x), packed.qweight, packed.channel_scale, packed.group_word, None,
            None, None, torch.bfloat16,
        )  # fmt: skip
        return y

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, layer())
    assert dispatch._KERNELS


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, few_call.MAX_TOKENS, few_call.MAX_TOKENS + 1])
def test_composites_give_what_their_parts_give_under_a_cuda_graph(
    fresh: None, device: torch.device, tokens: int
) -> None:
    dispatch.install()
    x, *weight = composite(tokens, device, normed=False)
    _, *norm_and_weight = composite(tokens, device, normed=True)

    def joined() -> list[torch.Tensor]:
        return [ops.quant_linear(x, *weight), *ops.norm_linear(x, *norm_and_weight)]

    joined()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = joined()
    x.copy_(torch.randn_like(x))
    graph.replay()
    *tensors, residual, dtype, _ = weight
    *parts, total, normed = ops.norm_quant(x, *norm_and_weight[:8])
    want = [
        ops.w4a8_linear(*ops.quantize_act(x), *tensors, residual, dtype),
        ops.w4a8_linear(*parts, *norm_and_weight[8:-3], residual, dtype),
        total,
        normed,
    ]
    assert torch.equal(results[0], want[0])
    for got, expected in zip(results[1:], want[1:], strict=True):
        # the norm adds up its squares in another order
        bound = TOLERANCE * float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=2**-8, atol=bound)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_the_second_gpu(fresh: None) -> None:
    x = torch.randn(5, 64, device="cuda:1")
    for a, b in zip(dispatch.quantize_act(x), quantize_act(x.cpu()), strict=True):
        assert a.device == x.device
        assert torch.equal(a.cpu(), b)
