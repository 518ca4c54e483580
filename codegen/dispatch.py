"""The CUDA implementations of the qoqc ops: from arguments to spec, tile, kernel and launch.

The functions also take CPU tensors where Triton interprets (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from qoqc.codegen import page_check
from qoqc.codegen.build import OPS, build, dump_kernels, runs
from qoqc.codegen.family import Kernel, Op
from qoqc.codegen.invariance import size_for
from qoqc.codegen.kernels import (
    act_quantize,
    attention,
    attention_combine,
    attention_decode,
    attention_hopper,
    attention_prefill,
    few_call,
    gemm,
    kv_append,
    kv_round,
    norm_call,
    norm_quantize,
    quantize,
    rotate_append_call,
    sampling,
    step_call,
    step_spec,
)
from qoqc.codegen.tuning import choose
from qoqc.ir.spec import PAGE
from qoqc.runtime.device import device_key, sm_count

_MODE: choose.Mode = "heuristic"
_DUMP: str | None = None
_KERNELS: dict[tuple[Any, ...], Kernel] = {}
_INSTALLED: list[torch.library.Library] = []
_LOCK = threading.Lock()
_HERE = contextlib.nullcontext()


def install(mode: choose.Mode = "heuristic", dump: str | None = None) -> None:
    """Put Triton kernels behind the qoqc ops for CUDA tensors. Later calls only set `mode`.

    dump  a directory for the sources of all kernels, those built so far and, since kernels are
          built at their first launch, those still to come; None leaves an earlier one in place
    """
    global _MODE, _DUMP
    with _LOCK:
        if dump is not None:
            _DUMP = dump
            dump_kernels(dump)
        if mode != _MODE:
            _MODE = mode
            _KERNELS.clear()
        if _INSTALLED:
            return
        library = torch.library.Library("qoqc", "IMPL")
        for name in IMPLEMENTATIONS:
            library.impl(name, _late_bound(name), "CUDA")
        _INSTALLED.append(library)


def _late_bound(name: str) -> Callable[..., Any]:
    """The implementation the table names at the time of the call: tests put checks around it."""

    def call(*args: Any) -> Any:
        return IMPLEMENTATIONS[name](*args)

    return page_check.checked(name, call)


def kernel_for(op: Op, spec: Any, size: int, device: torch.device) -> Kernel:
    """The kernel for launches of about `size` tokens on `device`: a dict look-up, mostly."""
    size = size_for(op, size)
    key = (op.name, spec, choose.bucket(size), device)
    kernel = _KERNELS.get(key)
    if kernel is None:
        if device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ValueError(
                f"{op.name}: the kernel needs a CUDA device, got {device}; "
                "set TRITON_INTERPRET=1 to run it in Triton's interpreter"
            )
        family, tile = choose.choose(op, spec, size, device, _MODE)
        kernel = _KERNELS.setdefault(key, build(family, spec, tile))
        dump_kernels(_DUMP)
    return kernel


def quantize_act(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qoqc::quantize_act by a generated kernel."""
    spec = quantize.spec_of(x)
    with _device_of(x):
        kernel = kernel_for(OPS["quantize"], spec, _tokens(x), x.device)
        return quantize.launch(kernel, x)


def norm_quant(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    round_first: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """qoqc::norm_quant by a generated kernel."""
    call = norm_call.call_of(
        x, residual, weight, bias, kind, eps, offset, round_first, keep
    )  # fmt: skip
    with _device_of(x):
        kernel = kernel_for(OPS["norm_quantize"], call.spec, call.tokens, x.device)
        return norm_quantize.launch(kernel, call)


def act_quant(gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """qoqc::act_quant by a generated kernel."""
    spec = act_quantize.spec_of(gate, up, kind)
    with _device_of(gate):
        kernel = kernel_for(OPS["act_quantize"], spec, _tokens(gate), gate.device)
        return act_quantize.launch(kernel, gate, up)


def w4a8_linear(
    xq: Tensor,
    token_scale: Tensor,
    token_sum: Tensor,
    qweight: Tensor,
    channel_scale: Tensor,
    group_word: Tensor | None,
    channel_zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """qoqc::w4a8_linear by a generated kernel."""
    call = gemm.call_of(
        xq, token_scale, token_sum, qweight, channel_scale, group_word, channel_zero, bias,
        residual, dtype,
    )  # fmt: skip
    with _device_of(xq):
        kernel = kernel_for(OPS["w4a8_linear"], call.spec, call.tokens, xq.device)
        return gemm.launch(kernel, call)


def w4a8_glu(
    xq: Tensor,
    token_scale: Tensor,
    token_sum: Tensor,
    qweight: Tensor,
    channel_scale: Tensor,
    group_word: Tensor | None,
    channel_zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """qoqc::w4a8_glu by a generated kernel."""
    call = gemm.call_of(
        xq, token_scale, token_sum, qweight, channel_scale, group_word, channel_zero, bias,
        None, dtype, glu=True,
    )  # fmt: skip
    with _device_of(xq):
        kernel = kernel_for(OPS["w4a8_linear"], call.spec, call.tokens, xq.device)
        return gemm.launch(kernel, call)


def quant_linear(
    x: Tensor,
    qweight: Tensor,
    channel_scale: Tensor,
    group_word: Tensor | None,
    channel_zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    glu: bool,
) -> Tensor:
    """qoqc::quant_linear in one launch for few tokens, else in those of its two parts."""
    weight = (qweight, channel_scale, group_word, channel_zero, bias, residual, dtype, glu)
    if few_call.takes(x, dtype):
        few = _few_linear(few_call.call_of(x, None, *weight))
        if few is not None:
            return few[0]
    return _linear_of(quantize_act(x), *weight)


def norm_linear(
    x: Tensor,
    norm_residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    round_first: bool,
    keep: bool,
    *weight: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """qoqc::norm_linear in one launch for few tokens, else in those of its two parts.

    weight  what quant_linear takes after x
    """
    norm = (x, norm_residual, norm_weight, norm_bias, kind, eps, offset, round_first, keep)
    *_, dtype, _ = weight
    if few_call.takes(x, dtype):
        few = _few_linear(few_call.call_of(x, norm_call.call_of(*norm), *weight))
        if few is not None:
            return few
    *parts, total, normed = norm_quant(*norm)
    return _linear_of(parts, *weight), total, normed


def _few_linear(call: few_call.FewCall) -> few_call.Outputs | None:
    """The outputs by one kernel, or None where no form of it runs."""
    device = call.x.device
    if not _runs(few_call.OP, call.spec, device):
        return None
    with _device_of(call.x):
        kernel = kernel_for(OPS[few_call.OP], call.spec, call.tokens, device)
        return few_call.launch(kernel, call)


def _linear_of(parts: Sequence[Tensor], *weight: Any) -> Tensor:
    """The linear of quantized tokens; `weight` as quant_linear takes it."""
    *tensors, residual, dtype, glu = weight
    if glu:
        gemm.check_glu(tensors[1], residual)
    arguments: Any = (*parts, *tensors, dtype) if glu else (*parts, *tensors, residual, dtype)
    return w4a8_glu(*arguments) if glu else w4a8_linear(*arguments)


def kv4_append(
    k_pages: Tensor,
    v_pages: Tensor,
    kv_words: Tensor,
    block_table: Tensor,
    start: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Literal[4, 8],
) -> None:
    """qoqc::kv4_append by a generated kernel; tokens beyond the block table are dropped."""
    spec = kv_append.spec_of(k_pages, v_pages, kv_words, block_table, start, k, v, bits)
    with _device_of(k):
        kernel = kernel_for(OPS["kv_append"], spec, k.shape[2], k.device)
        kv_append.launch(kernel, k_pages, v_pages, kv_words, block_table, start, k, v)


def kv4_rotate_append(*args: Any) -> tuple[Tensor, Tensor]:
    """qoqc::kv4_rotate_append by a generated kernel; no token beyond the block table is written."""
    call = rotate_append_call.Append(*args)
    spec = rotate_append_call.spec_of(call)
    with _device_of(call.q):
        kernel = kernel_for(OPS["kv_rotate_append"], spec, call.q.shape[2], call.q.device)
        return rotate_append_call.launch(kernel, call)


def kv4_round(x: Tensor, bits: Literal[4, 8]) -> Tensor:
    """qoqc::kv4_round by a generated kernel."""
    spec = kv_round.spec_of(x, bits)
    with _device_of(x):
        return kv_round.launch(kernel_for(OPS["kv_round"], spec, _tokens(x), x.device), x)


def kv4_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_words: Tensor,
    block_table: Tensor,
    length: Tensor,
    mask: Tensor | None,
    k_chunk: Tensor | None,
    v_chunk: Tensor | None,
    scale: float,
    bits: Literal[4, 8],
    causal: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """qoqc::kv4_attention: split along the cache for few queries, tiled over them for many.

    With softcap or sinks always tiled: their decode steps are kv4_decode's.
    """
    call = attention.Call(
        q, k_pages, v_pages, kv_words, block_table, length, mask, k_chunk, v_chunk, scale, softcap,
        sinks, window,
    )  # fmt: skip
    spec = attention.spec_of(call, bits, causal)
    seq, device = q.shape[2], q.device
    with _device_of(q):
        if not attention_decode.takes(call, spec):
            kernel = kernel_for(OPS["attention_prefill"], spec, seq, device)
            if kernel.family.name == "attention_prefill":
                return attention_prefill.launch(kernel, call)
            unpack = kernel_for(OPS["attention_unpack"], spec, seq, device)
            return attention_hopper.launch(unpack, kernel, call)
        kernel = kernel_for(OPS["attention_decode"], spec, seq, device)
        part, stat = attention_decode.launch(kernel, call, sm_count(device))
        combine = kernel_for(OPS["attention_combine"], spec, seq, device)
        capacity = block_table.shape[1] * PAGE
        return attention_combine.launch(combine, part, stat, length, call.empty_out(), capacity)


def kv4_decode(*args: Any) -> Tensor:
    """qoqc::kv4_decode in one launch, two where sequences have many parts to add up.

    One more where the tile of step_attend says that its token is put in by a kernel before it.
    """
    step = step_spec.Step(*args)
    if step.mask is not None and step.mask.dim() == 4 and step.mask.shape[1] != 1:
        return _decode_apart(step)
    spec, device = step_spec.spec_of(step), step.q.device
    with _device_of(step.q):
        attend = kernel_for(OPS["step_attend"], spec, step.batch, device)
        append = combine = None
        if not attend.tile["FUSED"]:
            append = kernel_for(OPS["step_append"], spec, step.batch, device)
        if not step_call.meets(spec, step.batch):
            combine = kernel_for(OPS["step_combine"], spec, step.batch, device)
        slots = step_call.slots_of(device, attend.tile)
        return step_call.launch(append, attend, combine, step, slots)


def _decode_apart(step: step_spec.Step) -> Tensor:
    """A step whose heads have masks of their own: by the kernels of longer chunks."""
    pages = (step.k_pages, step.v_pages, step.kv_words, step.block_table, step.length)
    q, _ = kv4_rotate_append(
        step.q, step.k, step.v, step.q_weight, step.k_weight, step.cos, step.sin, *pages,
        step.form, step.eps, step.offset, step.round_first, step.bits,
    )  # fmt: skip
    step.length.add_(1)
    return kv4_attention(
        q, *pages, step.mask, None, None, step.scale, step.bits, False, step.softcap, step.sinks,
        step.window,
    )  # fmt: skip


def sample_scores(
    scores: Tensor,
    temperature: Tensor | None,
    top_p: Tensor | None,
    key: Tensor | None,
    fill: float,
) -> Tensor:
    """qoqc::sample_scores by a generated kernel."""
    call = sampling.call_of(scores, temperature, top_p, key, fill)
    with _device_of(scores):
        kernel = kernel_for(OPS["sample_scores"], call.spec, scores.shape[0], scores.device)
        return sampling.launch(kernel, call)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """The device of `x` made the current one; nothing, in a tenth of the time, where it is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


@functools.cache
def _runs(name: str, spec: Any, device: torch.device) -> bool:
    """Whether a form of an op takes the spec there."""
    return runs(name, spec, device_key(device))


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "quantize_act": quantize_act,
    "norm_quant": norm_quant,
    "act_quant": act_quant,
    "w4a8_linear": w4a8_linear,
    "w4a8_glu": w4a8_glu,
    "quant_linear": quant_linear,
    "norm_linear": norm_linear,
    "kv4_append": kv4_append,
    "kv4_rotate_append": kv4_rotate_append,
    "kv4_round": kv4_round,
    "kv4_attention": kv4_attention,
    "kv4_decode": kv4_decode,
    "sample_scores": sample_scores,
}
