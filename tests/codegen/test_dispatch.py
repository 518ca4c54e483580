from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import OPS
from qoqc.codegen.kernels.quantize import QuantizeSpec
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
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_the_second_gpu(fresh: None) -> None:
    x = torch.randn(5, 64, device="cuda:1")
    for a, b in zip(dispatch.quantize_act(x), quantize_act(x.cpu()), strict=True):
        assert a.device == x.device
        assert torch.equal(a.cpu(), b)
