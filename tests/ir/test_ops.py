"""The qoqc:: ops as torch sees them: schemas, fakes, mutation, agreement with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qoqc.ir import kv_reference, ops, reference
from qoqc.quant.activation import quantize_act
from qoqc.quant.glu import interleaved
from qoqc.quant.kv import empty_pages, fake_quantize_kv
from qoqc.quant.weight import dequantize_weight, expand_int8, quantize_weight

Case = tuple[Any, tuple[Any, ...]]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def strided(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last two dimensions stored the other way round."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def linear_args(
    *, grouped: bool, dtype: torch.dtype, extra: bool, strides: bool = False
) -> tuple[Any, ...]:
    packed = quantize_weight(randn(70, 200), 128 if grouped else -1)
    xq, scale, total = quantize_act(randn(2, 3, 200, seed=1))
    bias = randn(70).to(dtype) if extra else None
    residual = randn(2, 3, 70).to(dtype) if extra else None
    if strides:
        xq = strided(xq)
        residual = None if residual is None else strided(residual)
    return (
        xq, scale, total, packed.qweight, packed.channel_scale, packed.group_word,
        packed.channel_zero, bias, residual, dtype,
    )  # fmt: skip


def norm_args(
    dtype: torch.dtype,
    kind: str,
    *,
    offset: float = 0.0,
    residual: bool = False,
    keep: bool = False,
    strides: bool = False,
) -> tuple[Any, ...]:
    x, r = randn(2, 3, 64).to(dtype), randn(2, 3, 64, seed=1).to(dtype)
    if strides:
        x, r = strided(x), strided(r)
    bias = randn(64, seed=3).to(dtype) if kind == "layer" else None
    weight = randn(64, seed=2).to(dtype)
    return (x, r if residual else None, weight, bias, kind, 1e-6, offset, False, keep)


def int8_args(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    xq, _, _ = quantize_act(randn(rows, 200, seed=1))
    return xq, expand_int8(quantize_weight(randn(70, 200), 128))


def pages(bits: int) -> tuple[torch.Tensor, ...]:
    """Filled pages of 2 sequences, 2 heads, and their block table."""
    k_pages, v_pages, words = empty_pages(5, 2, 8, 6, bits, "cpu")
    table = torch.tensor([[3, 0], [4, 1]], dtype=torch.int32)
    kv_reference.kv_append(
        k_pages, v_pages, words, table, torch.tensor([0, 0]),
        randn(2, 2, 90, 8), randn(2, 2, 90, 6), bits,
    )  # fmt: skip
    return k_pages, v_pages, words, table


def glu_args(*, grouped: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    packed = quantize_weight(randn(48, 200), 128 if grouped else -1)
    xq, scale, total = quantize_act(randn(2, 3, 200, seed=1))
    tensors = (packed.qweight, packed.channel_scale, packed.group_word, packed.channel_zero)
    return (xq, scale, total, *tensors, randn(48, seed=2).to(dtype), dtype)


def quant_linear_args(*, grouped: bool, dtype: torch.dtype, glu: bool) -> tuple[Any, ...]:
    if glu:
        _, _, _, *weight, _ = glu_args(grouped=grouped, dtype=dtype)
        return (randn(2, 3, 200, seed=4).to(dtype), *weight, None, dtype, True)
    _, _, _, *weight, _ = linear_args(grouped=grouped, dtype=dtype, extra=True)
    return (randn(2, 3, 200, seed=4).to(dtype), *weight, dtype, False)


def norm_linear_args(
    dtype: torch.dtype, *, glu: bool, residual: bool, keep: bool
) -> tuple[Any, ...]:
    x, *weight = quant_linear_args(grouped=not glu, dtype=dtype, glu=glu)
    summand = randn(2, 3, 200, seed=5).to(dtype) if residual else None
    scale, shift = randn(200, seed=6).to(dtype), randn(200, seed=7).to(dtype)
    norm = ("layer", 1e-5, 0.0, False) if keep else ("rms", 1e-6, 0.0, True)
    return (x, summand, scale, shift if keep else None, *norm, keep, *weight)


def append_args(bits: int, dtype: torch.dtype, seq: int = 3) -> tuple[Any, ...]:
    k, v = randn(2, seq, 2, 8).to(dtype), randn(2, seq, 2, 6, seed=1).to(dtype)
    start = torch.tensor([90, 62])
    return (*pages(bits), start, k.transpose(1, 2), v.transpose(1, 2), bits)


def dequant_args(bits: int, dtype: torch.dtype, chunk: bool) -> tuple[Any, ...]:
    k = randn(2, 2, 4, 8, seed=2).to(dtype) if chunk else None
    v = strided(randn(2, 2, 4, 6, seed=3).to(dtype)) if chunk else None
    return (*pages(bits), torch.tensor([90, 7]), k, v, bits, dtype)


def attention_args(
    bits: int, dtype: torch.dtype, seq: int, masked: bool, chunk: bool, causal: bool
) -> tuple[Any, ...]:
    q = randn(2, seq, 4, 8, seed=4).to(dtype).transpose(1, 2)  # as a model hands it over
    k = randn(2, 2, seq, 8, seed=2).to(dtype) if chunk else None
    v = randn(2, 2, seq, 6, seed=3).to(dtype) if chunk else None
    mask = randn(2, 1, seq, 128, seed=5) > 0 if masked else None
    length = torch.tensor([90, 7])
    return (q, *pages(bits), length, mask, k, v, 0.3, bits, causal)


def rotated_args(bits: int, dtype: torch.dtype, seq: int, *, normed: bool) -> tuple[Any, ...]:
    """q, k, v, weights, cosines, pages and lengths: what the two rotating ops begin with."""
    q, k, v = (
        randn(2, seq, heads, dim, seed=seed).to(dtype).transpose(1, 2)
        for seed, heads, dim in ((4, 4, 8), (2, 2, 8), (3, 2, 6))
    )
    weights = [randn(8, seed=6).to(dtype), randn(8, seed=7).to(dtype)] if normed else [None, None]
    turns = randn(2, seq, 8, seed=5)
    return (q, k, v, *weights, turns.cos(), turns.sin(), *pages(bits), torch.tensor([90, 7]))


CASES: dict[str, Callable[[], Case]] = {
    "int8_matmul": lambda: (ops.int8_matmul, int8_args(5)),
    "int8_matmul one row": lambda: (ops.int8_matmul, int8_args(1)),
    "quantize_act fp32": lambda: (ops.quantize_act, (randn(2, 3, 64),)),
    "quantize_act bf16": lambda: (ops.quantize_act, (randn(5, 64).to(BF16),)),
    "quantize_act strided": lambda: (ops.quantize_act, (strided(randn(2, 3, 64).to(FP16)),)),
    "quantize_act flat": lambda: (ops.quantize_act, (randn(64),)),
    "norm_quant rms": lambda: (ops.norm_quant, norm_args(BF16, "rms")),
    "norm_quant one plus weight": lambda: (ops.norm_quant, norm_args(FP16, "rms", offset=1.0)),
    "norm_quant layer kept": lambda: (
        ops.norm_quant, norm_args(FP32, "layer", residual=True, keep=True)
    ),
    "norm_quant centred strided": lambda: (
        ops.norm_quant, norm_args(BF16, "centred", residual=True, keep=True, strides=True)
    ),
    "act_quant silu halves": lambda: (
        ops.act_quant, (*randn(2, 3, 64).to(BF16).chunk(2, -1), "silu")
    ),
    "act_quant gelu": lambda: (ops.act_quant, (randn(5, 64), None, "gelu")),
    "act_quant strided": lambda: (
        ops.act_quant, (strided(randn(2, 3, 64)), randn(2, 3, 64), "relu")
    ),
    "w4a8 g128 bf16": lambda: (
        ops.w4a8_linear, linear_args(grouped=True, dtype=BF16, extra=False)
    ),
    "w4a8 g128 fp16 bias residual": lambda: (
        ops.w4a8_linear, linear_args(grouped=True, dtype=FP16, extra=True)
    ),
    "w4a8 per channel fp32": lambda: (
        ops.w4a8_linear, linear_args(grouped=False, dtype=FP32, extra=False)
    ),
    "w4a8 per channel strided": lambda: (
        ops.w4a8_linear, linear_args(grouped=False, dtype=BF16, extra=True, strides=True)
    ),
    "w4a8_glu g128 bf16": lambda: (ops.w4a8_glu, glu_args(grouped=True, dtype=BF16)),
    "w4a8_glu per channel fp16": lambda: (ops.w4a8_glu, glu_args(grouped=False, dtype=FP16)),
    "quant_linear g128 bf16": lambda: (
        ops.quant_linear, quant_linear_args(grouped=True, dtype=BF16, glu=False)
    ),
    "quant_linear per channel glu": lambda: (
        ops.quant_linear, quant_linear_args(grouped=False, dtype=FP16, glu=True)
    ),
    "norm_linear rms": lambda: (
        ops.norm_linear, norm_linear_args(BF16, glu=False, residual=False, keep=False)
    ),
    "norm_linear glu of a sum": lambda: (
        ops.norm_linear, norm_linear_args(BF16, glu=True, residual=True, keep=False)
    ),
    "norm_linear layer kept": lambda: (
        ops.norm_linear, norm_linear_args(FP32, glu=False, residual=True, keep=True)
    ),
    "kv4_append 4 bit": lambda: (ops.kv4_append, append_args(4, BF16)),
    "kv4_append 8 bit": lambda: (ops.kv4_append, append_args(8, FP32)),
    "kv4_append decode": lambda: (ops.kv4_append, append_args(4, BF16, seq=1)),
    "kv4_dequant 4 bit": lambda: (ops.kv4_dequant, dequant_args(4, BF16, chunk=False)),
    "kv4_dequant 8 bit chunk": lambda: (ops.kv4_dequant, dequant_args(8, FP16, chunk=True)),
    "kv4_attention decode": lambda: (
        ops.kv4_attention, (*attention_args(4, BF16, 1, False, False, False), 0.0, None, 0)
    ),
    "kv4_attention mask": lambda: (
        ops.kv4_attention, (*attention_args(4, FP32, 3, True, False, False), 0.0, None, 2)
    ),
    "kv4_attention chunk causal": lambda: (
        ops.kv4_attention,
        (*attention_args(8, BF16, 5, False, True, True), 20.0, randn(4, seed=9), 66),
    ),
    "attention causal": lambda: (
        ops.attention,
        (randn(2, 4, 3, 8), *randn(2, 2, 2, 3, 8, seed=1), None, None, 0.3, 20.0, True),
    ),
    "attention mask sinks": lambda: (
        ops.attention,
        (randn(2, 4, 3, 8).to(BF16), *randn(2, 2, 2, 5, 8, seed=1).to(BF16),
         randn(2, 1, 3, 5, seed=2) > 0, randn(4, seed=3).to(BF16), 0.3, 0.0, False),
    ),
    "kv4_rotate_append half": lambda: (
        ops.kv4_rotate_append,
        (*rotated_args(4, BF16, 5, normed=False), "half", 1e-6, 0.0, True, 4),
    ),
    "kv4_rotate_append normed": lambda: (
        ops.kv4_rotate_append,
        (*rotated_args(8, FP32, 3, normed=True), "interleaved", 1e-6, 1.0, False, 8),
    ),
    "kv4_decode": lambda: (
        ops.kv4_decode,
        (*rotated_args(4, BF16, 1, normed=False), None, None, "half", 1e-6, 0.0, True, 0.3, 0.0,
         4, 0),
    ),
    "kv4_decode sinks": lambda: (
        ops.kv4_decode,
        (*rotated_args(8, FP32, 1, normed=True), randn(2, 1, 1, 128, seed=8) > 0, randn(4, seed=9),
         "none", 1e-6, 0.0, True, 0.3, 20.0, 8, 5),
    ),
    "kv4_round 4 bit": lambda: (ops.kv4_round, (randn(2, 3, 8).to(BF16), 4)),
    "kv4_round 8 bit strided": lambda: (ops.kv4_round, (strided(randn(2, 3, 8)), 8)),
    "sample_scores": lambda: (
        ops.sample_scores,
        (randn(2, 50), torch.tensor([0.7, 1.0]), torch.tensor([0.5, 1.0]),
         torch.tensor([3, 0], dtype=torch.int32), -torch.inf),
    ),
    "sample_scores of nothing": lambda: (ops.sample_scores, (randn(2, 50), None, None, None, 0.0)),
}  # fmt: skip
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


WRITTEN: dict[Any, list[str]] = {
    ops.kv4_append: ["k_pages", "v_pages", "kv_words"],
    ops.kv4_rotate_append: ["k_pages", "v_pages", "kv_words"],
    ops.kv4_decode: ["k_pages", "v_pages", "kv_words", "length"],
}


def tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif result is not None:
        yield from result


def test_every_op_has_a_case() -> None:
    covered = {make()[0].name() for make in CASES.values()}
    assert covered == {f"qoqc::{name}" for name in ops.SCHEMAS}


@every_case
def test_opcheck(make: Callable[[], Case]) -> None:
    op, args = make()
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}


@every_case
def test_fake_agrees_with_real(make: Callable[[], Case]) -> None:
    op, args = make()
    mode = FakeTensorMode()
    fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
    with mode:
        fakes = list(tensors(op(*fake_args)))
    reals = list(tensors(op(*args)))
    assert len(fakes) == len(reals)
    for fake, real in zip(fakes, reals, strict=True):
        assert fake.shape == real.shape
        assert fake.dtype == real.dtype
        assert fake.stride() == real.stride()
        assert fake.device == real.device


@every_case
def test_outputs_are_fresh_and_inputs_keep(make: Callable[[], Case]) -> None:
    op, args = make()
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    outputs = list(tensors(op(*args)))
    mutable = WRITTEN.get(op, [])
    inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
    assert not inputs & {x.untyped_storage().data_ptr() for x in outputs}
    for declared, now, then in zip(op._schema.arguments, args, before, strict=True):
        if isinstance(now, torch.Tensor):
            assert torch.equal(now, then) is (declared.name not in mutable), declared.name


@pytest.mark.parametrize("name", sorted(ops.SCHEMAS))
def test_only_appends_mutate(name: str) -> None:
    op = getattr(torch.ops.qoqc, name).default
    arguments = op._schema.arguments
    written = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
    assert written == WRITTEN.get(op, [])


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_w4a8_linear_equals_the_integer_path(grouped: bool, dtype: torch.dtype) -> None:
    args = linear_args(grouped=grouped, dtype=dtype, extra=True)
    xq, scale, _, _, channel_scale, _, _, bias, residual, _ = args
    w8 = expand_int8(quantize_weight(randn(70, 200), 128 if grouped else -1))
    acc = torch.einsum("abk,nk->abn", xq.long(), w8.long()).float()
    want = acc * channel_scale * scale[..., None] + bias.float() + residual.float()
    assert torch.equal(ops.w4a8_linear(*args), want.to(dtype))
    expanded = reference.int8_linear(xq, scale, w8, channel_scale, bias, residual, dtype)
    assert torch.equal(expanded, want.to(dtype))


@pytest.mark.parametrize("grouped", [True, False])
def test_a_whole_linear_is_near_its_float_twin(grouped: bool) -> None:
    w, x = randn(70, 200), randn(5, 200, seed=1)
    packed = quantize_weight(w, 128 if grouped else -1)
    xq, scale, total = ops.quantize_act(x)
    y = ops.w4a8_linear(
        xq, scale, total, packed.qweight, packed.channel_scale, packed.group_word,
        packed.channel_zero, None, None, FP32,
    )  # fmt: skip
    weight = dequantize_weight(packed)
    # what is left against the exact product with the same weight is half a step per activation
    bound = 0.5 * scale[:, None] * weight.abs().sum(1) * (1 + 1e-4)
    assert bool(((y - x @ weight.t()).abs() <= bound).all())


def test_glu_is_silu_of_one_half_times_the_other() -> None:
    args = glu_args(grouped=True, dtype=FP32)
    xq, scale, _, qweight, channel_scale, word, zero, bias, dtype = args
    w8 = expand_int8(ops.packed_of(xq, qweight, channel_scale, word, zero))
    stacked = torch.empty_like(w8)
    order = interleaved(len(w8) // 2)
    stacked[order], scales, biases = w8, torch.empty_like(channel_scale), torch.empty_like(bias)
    scales[order], biases[order] = channel_scale, bias
    gate, up = (
        reference.int8_linear(xq, scale, *(t[half] for t in (stacked, scales, biases)), None, dtype)
        for half in (slice(0, len(w8) // 2), slice(len(w8) // 2, None))
    )
    want = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(ops.w4a8_glu(*args), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_quant_linear_is_its_two_ops(grouped: bool, glu: bool) -> None:
    args = quant_linear_args(grouped=grouped, dtype=BF16, glu=glu)
    x, *weight, residual, dtype, _ = args
    linear = ops.w4a8_glu if glu else ops.w4a8_linear
    last = (dtype,) if glu else (residual, dtype)
    assert torch.equal(ops.quant_linear(*args), linear(*ops.quantize_act(x), *weight, *last))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("glu", [False, True])
def test_norm_linear_is_its_two_ops(glu: bool, summed: bool, keep: bool) -> None:
    args = norm_linear_args(FP16, glu=glu, residual=summed, keep=keep)
    *weight, residual, dtype, _ = args[9:]
    *parts, total, normed = ops.norm_quant(*args[:9])
    linear = ops.w4a8_glu if glu else ops.w4a8_linear
    want = linear(*parts, *weight, *((dtype,) if glu else (residual, dtype)))
    for a, b in zip(ops.norm_linear(*args), (want, total, normed), strict=True):
        assert torch.equal(a, b)


def test_a_composite_with_glu_takes_no_residual() -> None:
    *args, _, dtype, glu = quant_linear_args(grouped=True, dtype=BF16, glu=True)
    with pytest.raises(ValueError, match="takes no residual"):
        ops.quant_linear(*args, randn(2, 3, 24).to(BF16), dtype, glu)


def test_append_then_dequant_is_the_round_op() -> None:
    args = append_args(4, BF16)
    k_pages, v_pages, words, table, start, k, v, bits = args
    ops.kv4_append(*args)
    got_k, got_v = ops.kv4_dequant(
        k_pages, v_pages, words, table, start + 3, None, None, bits, BF16
    )
    for b, first in enumerate(start.tolist()):
        assert torch.equal(got_k[b, :, first : first + 3], ops.kv4_round(k, bits)[b])
        assert torch.equal(got_v[b, :, first : first + 3], ops.kv4_round(v, bits)[b])
        assert not got_k[b, :, first + 3 :].any()
    assert torch.equal(ops.kv4_round(k, 4), fake_quantize_kv(k, 4))


def test_append_is_kept_by_a_compiled_graph() -> None:
    # an op without outputs survives only if its mutation is declared
    args = append_args(4, FP32)
    expected = [x.clone() for x in args[:3]]
    ops.kv4_append(*expected, *args[3:])
    compiled = torch.compile(
        lambda *a: ops.kv4_append(*a[:-1], 4), backend="aot_eager", fullgraph=True
    )
    compiled(*args)
    for got, want in zip(args[:3], expected, strict=True):
        assert torch.equal(got, want)


def test_fakes_follow_a_symbolic_token_count() -> None:
    args = linear_args(grouped=True, dtype=BF16, extra=False)

    def run(x: torch.Tensor) -> torch.Tensor:
        xq, scale, total = ops.quantize_act(x)
        y: torch.Tensor = ops.w4a8_linear(xq, scale, total, *args[3:])
        return y

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (4, 9, 33):
            x = randn(2, count, 200)
            assert torch.equal(compiled(x), run(x))


# packed_of


def packed_args(grouped: bool = True) -> dict[str, Any]:
    args = linear_args(grouped=grouped, dtype=BF16, extra=False)
    names = ("qweight", "channel_scale", "group_word", "channel_zero")
    return {"xq": args[0], **dict(zip(names, args[3:7], strict=True))}


@pytest.mark.parametrize("grouped", [True, False])
def test_packed_of_finds_the_sizes(grouped: bool) -> None:
    packed = ops.packed_of(**packed_args(grouped))
    assert (packed.out_features, packed.in_features) == (70, 200)
    assert packed.group_size == (128 if grouped else -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_word": None}, "group_word .* or channel_zero"),
        ({"group_word": torch.zeros(1, 70, dtype=torch.int32)}, r"scales \(1, 70\) .* 70 x 200"),
        ({"channel_zero": torch.zeros(70, dtype=torch.int32)}, "one"),
        (
            {"qweight": torch.zeros(1, 1, 128, 64, dtype=torch.uint8)},
            r"\(1, 1, 128, 64\).*70 x 200",
        ),
        ({"channel_scale": torch.ones(129)}, "129 x 200"),
        ({"xq": torch.zeros(2, 300, dtype=torch.int8)}, "70 x 300"),
        ({"xq": torch.zeros(2, 200)}, "int8 xq .* torch.float32"),
        ({"qweight": torch.zeros(1, 2, 128, 64, dtype=torch.int8)}, "uint8 qweight.*torch.int8"),
    ],
)
def test_packed_of_names_what_disagrees(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.packed_of(**(packed_args() | changes))


def test_a_linear_of_both_formats_is_refused() -> None:
    args = list(linear_args(grouped=True, dtype=BF16, extra=False))
    args[6] = torch.zeros(70, dtype=torch.int32)
    with pytest.raises(ValueError, match="one"):
        ops.w4a8_linear(*args)


@pytest.mark.parametrize("strides", [(200, 1), (0, 1), (1, 1), (7, 1)])
def test_a_single_row_of_any_stride_is_multiplied_right(strides: tuple[int, int]) -> None:
    """Inductor hands over single rows with stride 0, which torch's int8 GEMM gets wrong."""
    xq, w8 = int8_args(1)
    row = xq.as_strided((1, 200), strides)
    want = (xq.long() @ w8.long().t()).int()
    assert torch.equal(ops.int8_matmul(row, w8), want)
