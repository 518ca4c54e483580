"""The qoqc:: ops: schema, fake, reference. Passes write them, codegen gives them kernels.

The reference (reference.py, kv_reference.py) is registered for every device; codegen registers
Triton kernels for CUDA on top. Shapes: B batch, H KV heads, Hq query heads, S new tokens, P pages
per sequence, K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from qoqc.ir import glue, kv_reference, reference, sampling
from qoqc.ir.spec import PAGE
from qoqc.quant.activation import quantize_act as _quantize_act
from qoqc.quant.kv import fake_quantize_kv
from qoqc.quant.weight import PackedWeight, expand_int8

SCHEMAS = {
    # x [..., K] -> int8 [..., K], token_scale fp32 [...], token_sum int32 [...]
    "quantize_act": "(Tensor x) -> (Tensor, Tensor, Tensor)",
    # quantize_act of norm(x + residual); also the sum and, if `keep`, the norm (ir/glue.py)
    "norm_quant": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str kind, float eps, "
        "float offset, bool round_first, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # quantize_act of activation(gate) * up
    "act_quant": "(Tensor gate, Tensor? up, str kind) -> (Tensor, Tensor, Tensor)",
    # one format: group_word (g128) or channel_zero (per channel) -> dtype [..., N]
    "w4a8_linear": (
        "(Tensor xq, Tensor token_scale, Tensor token_sum, Tensor qweight, Tensor channel_scale, "
        "Tensor? group_word, Tensor? channel_zero, Tensor? bias, Tensor? residual, "
        "ScalarType dtype) -> Tensor"
    ),
    # the same with rows that are gate and up in turn (quant/glu.py): silu(gate) * up [..., N / 2]
    "w4a8_glu": (
        "(Tensor xq, Tensor token_scale, Tensor token_sum, Tensor qweight, Tensor channel_scale, "
        "Tensor? group_word, Tensor? channel_zero, Tensor? bias, ScalarType dtype) -> Tensor"
    ),
    # quantize_act, then one linear that alone reads it: w4a8_glu if `glu`, else w4a8_linear
    "quant_linear": (
        "(Tensor x, Tensor qweight, Tensor channel_scale, Tensor? group_word, "
        "Tensor? channel_zero, Tensor? bias, Tensor? residual, ScalarType dtype, bool glu) "
        "-> Tensor"
    ),
    # the same with norm_quant -> y, and its fourth and fifth output
    "norm_linear": (
        "(Tensor x, Tensor? norm_residual, Tensor? norm_weight, Tensor? norm_bias, str kind, "
        "float eps, float offset, bool round_first, bool keep, Tensor qweight, "
        "Tensor channel_scale, Tensor? group_word, Tensor? channel_zero, Tensor? bias, "
        "Tensor? residual, ScalarType dtype, bool glu) -> (Tensor, Tensor, Tensor)"
    ),
    # xq int8 [M, K], w8 int8 [N, K] -> int32 [M, N]: the GEMM of CPUs, weights expanded beforehand
    "int8_matmul": "(Tensor xq, Tensor w8) -> Tensor",
    # k [B, H, S, Dk], v [B, H, S, Dv] into the pages from position start[b] on
    "kv4_append": (
        "(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) kv_words, Tensor block_table, "
        "Tensor start, Tensor k, Tensor v, int bits) -> ()"
    ),
    # -> k [B, H, P*64, Dk], v [B, H, P*64, Dv]; the last S of `length` tokens from the chunk
    "kv4_dequant": (
        "(Tensor k_pages, Tensor v_pages, Tensor kv_words, Tensor block_table, Tensor length, "
        "Tensor? k_chunk, Tensor? v_chunk, int bits, ScalarType dtype) -> (Tensor, Tensor)"
    ),
    # q [B, Hq, S, Dk] -> [B, Hq, S, Dv]; window: keys a query sees, itself one of them, or 0: all
    "kv4_attention": (
        "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor kv_words, Tensor block_table, "
        "Tensor length, Tensor? mask, Tensor? k_chunk, Tensor? v_chunk, float scale, int bits, "
        "bool causal, float softcap=0.0, Tensor? sinks=None, int window=0) -> Tensor"
    ),
    # q [B, Hq, S, Dk], k [B, H, L, Dk], v [B, H, L, Dv] -> [B, Hq, S, Dv]: what SDPA does not have
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, float softcap, "
        "bool causal) -> Tensor"
    ),
    # q [B, Hq, S, Dk], k, v as a projection gives them: head norm and rotation (ir/rotary.py) of
    # q and k, then kv4_append -> q and k as attention reads them
    "kv4_rotate_append": (
        "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
        "Tensor? sin, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) kv_words, "
        "Tensor block_table, Tensor start, str form, float eps, float offset, bool round_first, "
        "int bits) -> (Tensor, Tensor)"
    ),
    # one new token per sequence, from projection to attention output [B, Hq, 1, Dv]: the above at
    # `length`, which then counts the token, and attention over the sequence or its `window`
    "kv4_decode": (
        "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
        "Tensor? sin, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) kv_words, "
        "Tensor block_table, Tensor(d!) length, Tensor? mask, Tensor? sinks, str form, float eps, "
        "float offset, bool round_first, float scale, float softcap, int bits, int window=0) "
        "-> Tensor"
    ),
    # x [..., D] -> [..., D]: the value a cache of `bits` would give back
    "kv4_round": "(Tensor x, int bits) -> Tensor",
    # fp32 [rows, vocabulary] -> scores whose argmax is a draw (ir/sampling.py)
    "sample_scores": (
        "(Tensor scores, Tensor? temperature, Tensor? top_p, Tensor? key, float fill) -> Tensor"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"qoqc::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

quantize_act = torch.ops.qoqc.quantize_act.default
norm_quant = torch.ops.qoqc.norm_quant.default
act_quant = torch.ops.qoqc.act_quant.default
w4a8_linear = torch.ops.qoqc.w4a8_linear.default
w4a8_glu = torch.ops.qoqc.w4a8_glu.default
quant_linear = torch.ops.qoqc.quant_linear.default
norm_linear = torch.ops.qoqc.norm_linear.default
int8_matmul = torch.ops.qoqc.int8_matmul.default
kv4_append = torch.ops.qoqc.kv4_append.default
kv4_dequant = torch.ops.qoqc.kv4_dequant.default
kv4_attention = torch.ops.qoqc.kv4_attention.default
attention = torch.ops.qoqc.attention.default
kv4_rotate_append = torch.ops.qoqc.kv4_rotate_append.default
kv4_decode = torch.ops.qoqc.kv4_decode.default
kv4_round = torch.ops.qoqc.kv4_round.default
sample_scores = torch.ops.qoqc.sample_scores.default

QUANTIZERS = (quantize_act, norm_quant, act_quant)
"""The ops whose first three outputs are what a w4a8_linear reads."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _fake(name: str) -> Callable[[_Function], _Function]:
    """Register the shape function of an op (torch leaves its own decorator untyped)."""
    register: Callable[[_Function], _Function] = torch.library.register_fake(f"qoqc::{name}")
    return register


def packed_of(
    xq: Tensor,
    qweight: Tensor,
    channel_scale: Tensor,
    group_word: Tensor | None,
    channel_zero: Tensor | None,
) -> PackedWeight:
    """The PackedWeight behind the tensors of a w4a8_linear call; ValueError if they disagree."""
    n, k = channel_scale.shape[0], xq.shape[-1]
    if (group_word is None) == (channel_zero is None):
        raise ValueError("w4a8_linear takes group_word (g128) or channel_zero (per channel): one")
    if tuple(qweight.shape) != (-(-n // 128), -(-k // 128), 128, 64):
        raise ValueError(f"qweight {tuple(qweight.shape)} does not hold {n} x {k} 4-bit weights")
    grid = channel_zero if group_word is None else group_word
    if grid is not None and tuple(grid.shape) != (
        (n,) if group_word is None else (-(-k // 128), n)
    ):
        raise ValueError(f"scales {tuple(grid.shape)} do not belong to {n} x {k} weights")
    if xq.dtype != torch.int8 or qweight.dtype != torch.uint8:
        raise ValueError(f"expected int8 xq and uint8 qweight, got {xq.dtype} and {qweight.dtype}")
    return PackedWeight(qweight, channel_scale, group_word, channel_zero, n, k)


@torch.library.impl("qoqc::quantize_act", "default")
def _quantize_act_impl(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _quantize_act(x)


@_fake("quantize_act")
def _quantize_act_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
    )


@torch.library.impl("qoqc::norm_quant", "default")
def _norm_quant_impl(*args: Any) -> tuple[Tensor, ...]:
    return glue.norm_quant(*args)


@_fake("norm_quant")
def _norm_quant_fake(
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
    return (
        *_quantize_act_fake(x),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(x.shape if keep else 0),
    )


@torch.library.impl("qoqc::act_quant", "default")
def _act_quant_impl(gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    return glue.act_quant(gate, up, kind)


@_fake("act_quant")
def _act_quant_fake(gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    return _quantize_act_fake(gate)


@torch.library.impl("qoqc::w4a8_linear", "default")
def _w4a8_linear_impl(
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
    # token_sum serves kernels that keep the zero point out of the main loop: the result is equal
    w8 = expand_int8(packed_of(xq, qweight, channel_scale, group_word, channel_zero))
    return reference.int8_linear(xq, token_scale, w8, channel_scale, bias, residual, dtype)


@_fake("w4a8_linear")
def _w4a8_linear_fake(
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
    return xq.new_empty((*xq.shape[:-1], channel_scale.shape[0]), dtype=dtype)


@torch.library.impl("qoqc::w4a8_glu", "default")
def _w4a8_glu_impl(
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
    w8 = expand_int8(packed_of(xq, qweight, channel_scale, group_word, channel_zero))
    return reference.int8_glu(xq, token_scale, w8, channel_scale, bias, dtype)


@_fake("w4a8_glu")
def _w4a8_glu_fake(
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
    return xq.new_empty((*xq.shape[:-1], channel_scale.shape[0] // 2), dtype=dtype)


def _linear(parts: Sequence[Tensor], *args: Any) -> Tensor:
    """The linear of a composite op, on quantized activations."""
    *weight, residual, dtype, glu = args
    if glu and residual is not None:
        raise ValueError("a linear with glu takes no residual: add it to the result")
    last = (dtype,) if glu else (residual, dtype)
    y: Tensor = (w4a8_glu if glu else w4a8_linear)(*parts, *weight, *last)
    return y


@torch.library.impl("qoqc::quant_linear", "default")
def _quant_linear_impl(x: Tensor, *args: Any) -> Tensor:
    return _linear(_quantize_act(x), *args)


@_fake("quant_linear")
def _quant_linear_fake(x: Tensor, qweight: Tensor, channel_scale: Tensor, *args: Any) -> Tensor:
    *_, dtype, glu = args
    return x.new_empty((*x.shape[:-1], channel_scale.shape[0] // (1 + glu)), dtype=dtype)


@torch.library.impl("qoqc::norm_linear", "default")
def _norm_linear_impl(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *parts, total, normed = glue.norm_quant(*args[:9])
    return _linear(parts, *args[9:]), total, normed


@_fake("norm_linear")
def _norm_linear_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, total, normed = _norm_quant_fake(*args[:9])
    return _quant_linear_fake(args[0], *args[9:]), total, normed


@torch.library.impl("qoqc::int8_matmul", "default")
def _int8_matmul_impl(xq: Tensor, w8: Tensor) -> Tensor:
    return reference.integer_matmul(xq, w8)


@_fake("int8_matmul")
def _int8_matmul_fake(xq: Tensor, w8: Tensor) -> Tensor:
    return xq.new_empty((xq.shape[0], w8.shape[0]), dtype=torch.int32)


torch.library.impl("qoqc::kv4_append", "default")(kv_reference.kv_append)


@_fake("kv4_append")
def _kv4_append_fake(*args: Any) -> None:
    return None


torch.library.impl("qoqc::kv4_dequant", "default")(kv_reference.kv_dequant)


@_fake("kv4_dequant")
def _kv4_dequant_fake(
    k_pages: Tensor,
    v_pages: Tensor,
    kv_words: Tensor,
    block_table: Tensor,
    length: Tensor,
    k_chunk: Tensor | None,
    v_chunk: Tensor | None,
    bits: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    batch, tokens = block_table.shape[0], block_table.shape[1] * PAGE
    heads, k_dim, v_dim = k_pages.shape[1], k_pages.shape[-1] * 8 // bits, v_pages.shape[2]
    return (
        k_pages.new_empty((batch, heads, tokens, k_dim), dtype=dtype),
        k_pages.new_empty((batch, heads, tokens, v_dim), dtype=dtype),
    )


@torch.library.impl("qoqc::kv4_attention", "default")
def _kv4_attention_impl(*args: Any) -> Tensor:
    return kv_reference.kv_attention(*args)


@_fake("kv4_attention")
def _kv4_attention_fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *args: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v_pages.shape[2]))


@torch.library.impl("qoqc::attention", "default")
def _attention_impl(*args: Any) -> Tensor:
    return kv_reference.attention(*args)


@_fake("attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.impl("qoqc::kv4_rotate_append", "default")
def _kv4_rotate_append_impl(*args: Any) -> tuple[Tensor, Tensor]:
    return kv_reference.kv_rotate_append(*args)


@_fake("kv4_rotate_append")
def _kv4_rotate_append_fake(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.impl("qoqc::kv4_decode", "default")
def _kv4_decode_impl(*args: Any) -> Tensor:
    return kv_reference.kv_decode(*args)


@_fake("kv4_decode")
def _kv4_decode_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


torch.library.impl("qoqc::kv4_round", "default")(fake_quantize_kv)


@_fake("kv4_round")
def _kv4_round_fake(x: Tensor, bits: int) -> Tensor:
    return x.new_empty(x.shape)


torch.library.impl("qoqc::sample_scores", "default")(sampling.sample_scores)


@_fake("sample_scores")
def _sample_scores_fake(scores: Tensor, *args: Any) -> Tensor:
    return scores.new_empty(scores.shape)
