from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.family import Family
from qoqc.codegen.kernels.gemm import call_of, launch
from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.codegen.tuning.choose import bucket
from qoqc.ir import ops
from qoqc.ir.reference import int8_linear
from qoqc.ir.spec import OUTPUT_DTYPES, LinearSpec
from qoqc.quant.activation import quantize_act
from qoqc.quant.glu import apart, interleaved
from qoqc.quant.weight import concat_rows, expand_int8, quantize_weight, rows
from qoqc.runtime.device import device_key

GroupSize = Literal[128, -1]
FORMATS: tuple[GroupSize, ...] = (128, -1)
WEIGHT = ("xq", "qweight", "channel_scale", "group_word", "channel_zero")


@pytest.fixture(params=GEMM.forms, ids=lambda form: form.name)
def form(request: pytest.FixtureRequest, device: torch.device) -> Family:
    """Every form of the GEMM that runs on the device."""
    family: Family = request.param
    reason = family.refuses(LinearSpec(128, 128, 128, torch.bfloat16), device_key(device))
    if reason:
        pytest.skip(reason)
    return family


def arguments(
    m: int,
    n: int,
    k: int,
    group_size: GroupSize,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    residual: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments of w4a8_linear: random tokens and a random weight with a few extreme rows."""
    torch.manual_seed(m * 31 + n * 17 + k)
    weight = torch.randn(n, k, device=device) * torch.logspace(-4, 2, n, device=device)[:, None]
    if n > 2:
        weight[1] = 0
        weight[2] = weight[2].abs()
    packed = quantize_weight(weight, group_size)
    xq, token_scale, token_sum = quantize_act(torch.randn(m, k, device=device))
    return {
        "xq": xq,
        "token_scale": token_scale,
        "token_sum": token_sum,
        "qweight": packed.qweight,
        "channel_scale": packed.channel_scale,
        "group_word": packed.group_word,
        "channel_zero": packed.channel_zero,
        "bias": torch.randn(n, device=device).to(dtype) if bias else None,
        "residual": torch.randn(m, n, device=device).to(dtype) if residual else None,
        "dtype": dtype,
    }


def reference(args: dict[str, Any]) -> torch.Tensor:
    """The definition in torch, on whatever device: dispatch.install() cannot hide it."""
    w8 = expand_int8(ops.packed_of(*(args[n] for n in WEIGHT)))
    names = ("channel_scale", "bias", "residual", "dtype")
    return int8_linear(args["xq"], args["token_scale"], w8, *(args[n] for n in names))


def moved(args: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def multiply(form: Family, args: dict[str, Any], device: torch.device) -> torch.Tensor:
    """The product by a form, with the tile its heuristic takes; a form may refuse the spec."""
    call, key = call_of(**moved(args, device)), device_key(device)
    if reason := form.refuses(call.spec, key):
        pytest.skip(reason)
    tile = form.heuristic(call.spec, bucket(call.tokens), key)
    return launch(build(form, call.spec, tile), call)


def assert_equal_to_twin(form: Family, args: dict[str, Any], device: torch.device) -> None:
    got, want = multiply(form, args, device), reference(args)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(got.to(want.device), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 128, 128),
        (2, 64, 256),
        (17, 200, 128),
        (9, 264, 400),  # tails of N and K that the sm_90 form takes too
        (5, 1, 384),
        (3, 129, 300),
        (4, 257, 65),
        (16, 96, 2),
        (65, 130, 256),
        (130, 72, 136),
        (0, 128, 128),
        (3, 0, 128),
        (3, 7, 0),
    ],
)
def test_shapes(
    form: Family, m: int, n: int, k: int, group_size: GroupSize, device: torch.device
) -> None:
    assert_equal_to_twin(form, arguments(m, n, k, group_size), device)


@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_epilogues(
    form: Family,
    group_size: GroupSize,
    dtype: torch.dtype,
    bias: bool,
    residual: bool,
    device: torch.device,
) -> None:
    # a tail of K, in whole 16 bytes: the sm_90 form takes no other
    assert_equal_to_twin(form, arguments(5, 136, 208, group_size, dtype, bias, residual), device)


@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize(("m", "n"), [(5, 144), (1, 16), (70, 272)])
def test_silu_of_gate_times_up(
    form: Family, group_size: GroupSize, dtype: torch.dtype, m: int, n: int, device: torch.device
) -> None:
    args = arguments(m, n, 208, group_size, dtype, bias=True)
    del args["residual"]
    order = interleaved(n // 2)
    call = call_of(**moved(args, device), residual=None, glu=True)
    if reason := form.refuses(call.spec, device_key(device)):
        pytest.skip(reason)
    tile = form.heuristic(call.spec, bucket(m), device_key(device))
    got = launch(build(form, call.spec, tile), call).cpu()
    stacked = torch.empty(m, n, dtype=dtype)
    stacked[:, order] = reference({**args, "residual": None})
    gate, up = stacked[:, : n // 2], stacked[:, n // 2 :]
    want = torch.nn.functional.silu(gate) * up
    # exp may differ in its last bits (in torch too, by where an element lies), and silu(gate) then
    # rounds to a neighbour; where exp overflows silu(gate) is 0 or less than 1e-36
    rtol = max(2 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(ops.w4a8_glu(**args), want, rtol=rtol, atol=1e-30)
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-30)
    assert (got != want).float().mean() < (0.01 if dtype is not torch.float32 else 1)


def test_gate_and_up_take_turns_of_eight() -> None:
    assert interleaved(16).tolist() == [
        *range(8), *range(16, 24), *range(8, 16), *range(24, 32)
    ]  # fmt: skip
    gate, up = apart(interleaved(24).float())
    assert gate.tolist() == list(range(24))
    assert up.tolist() == list(range(24, 48))
    with pytest.raises(ValueError, match="12 rows cannot take turns of 8"):
        interleaved(12)
    args = arguments(2, 24, 128, 128)
    with pytest.raises(ValueError, match="gate and up in turns of 8 rows .* got 24 rows"):
        call_of(**args, glu=True)


@pytest.mark.parametrize("group_size", FORMATS)
def test_one_input_channel(form: Family, group_size: GroupSize, device: torch.device) -> None:
    args = arguments(16, 96, 1, group_size, torch.float32)
    packed = ops.packed_of(*(args[n] for n in WEIGHT))
    acc = args["xq"].float() * expand_int8(packed).float().t()
    want = acc * args["channel_scale"] * args["token_scale"][:, None]
    assert torch.equal(multiply(form, args, device).cpu(), want)


@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_sums(
    form: Family, group_size: GroupSize, dtype: torch.dtype, device: torch.device
) -> None:
    args = arguments(2, 128, 4096, group_size, dtype)
    args["xq"] = torch.full_like(args["xq"], -127)
    args["xq"][1] = 127
    args["token_sum"] = args["xq"].sum(1, dtype=torch.int32)
    assert_equal_to_twin(form, args, device)


def test_nan_token_gives_a_nan_row(form: Family, device: torch.device) -> None:
    args = arguments(3, 64, 128, 128)
    x = torch.randn(3, 128)
    x[1, 5] = torch.nan
    args["xq"], args["token_scale"], args["token_sum"] = quantize_act(x)
    y = multiply(form, args, device)
    assert y.isnan().any(1).tolist() == [False, True, False]
    assert_equal_to_twin(form, args, device)


@pytest.mark.parametrize("group_size", FORMATS)
def test_cut_and_joined_weights(form: Family, group_size: GroupSize, device: torch.device) -> None:
    # their padding along K holds codes of another row: it must not count
    args = arguments(3, 0, 208, group_size)
    parts = [quantize_weight(torch.randn(n, 208), group_size) for n in (40, 100)]
    packed = concat_rows([parts[0], rows(parts[1], 10, 90)])
    assert_equal_to_twin(form, {**args, **packed.tensors()}, device)


def test_leading_axes_and_strides(form: Family, device: torch.device) -> None:
    args = arguments(6, 72, 256, 128, bias=True, residual=True)
    flat = reference(args)
    for name in ("xq", "token_scale", "token_sum", "residual"):
        args[name] = args[name].unflatten(0, (2, 3))
    args["xq"] = torch.cat((args["xq"], args["xq"]), -1)[..., :256]
    args["residual"] = args["residual"].transpose(0, 1).contiguous().transpose(0, 1)
    args["group_word"] = args["group_word"].t().contiguous().t()
    assert not args["xq"].is_contiguous()
    got = multiply(form, args, device)
    assert torch.equal(got.cpu(), flat.view(2, 3, 72))


@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize("shape", [(33, 136, 200), (33, 136, 208), (16, 128, 256)])
def test_candidates_agree(
    form: Family, group_size: GroupSize, shape: tuple[int, int, int], device: torch.device
) -> None:
    m, n, k = shape
    args = arguments(m, n, k, group_size, bias=True, residual=True)
    call, key, want = call_of(**moved(args, device)), device_key(device), reference(args)
    if reason := form.refuses(call.spec, key):
        pytest.skip(reason)
    tiles = form.candidates(call.spec, 64, key)
    for tile in tiles if device.type == "cuda" else tiles[::5]:
        if form.shared_bytes is None or form.shared_bytes(call.spec, tile) <= key.shared_bytes:
            got = launch(build(form, call.spec, tile), call)
            assert torch.equal(got.cpu(), want), tile


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("xq", torch.zeros(4, 128, dtype=torch.uint8), r"xq must be torch.int8 \(4, 128\), got "),
        ("token_scale", torch.zeros(5), r"token_scale must be torch.float32 \(4,\), got .*\(5,\)"),
        ("token_sum", torch.zeros(4), r"token_sum must be torch.int32 \(4,\)"),
        ("qweight", torch.zeros(1, 2, 128, 64, dtype=torch.uint8), r"qweight .*\(1, 1, 128, 64\)"),
        ("group_word", torch.zeros(1, 63, dtype=torch.int32), r"group_word .*\(1, 64\)"),
        ("channel_zero", torch.zeros(64, dtype=torch.int32), "group_word .* or channel_zero"),
        ("group_word", None, "group_word .* or channel_zero"),
        ("bias", torch.zeros(63), r"bias must be .* \(64,\), got torch.float32 \(63,\)"),
        ("residual", torch.zeros(3, 64), r"residual must be .* \(4, 64\), got .* \(3, 64\)"),
        ("dtype", torch.int32, "bfloat16, float16 or float32, not torch.int32"),
    ],
)
def test_refused(name: str, value: Any, message: str, device: torch.device) -> None:
    args = moved({**arguments(4, 64, 128, 128), name: value}, device)
    with pytest.raises(ValueError, match=message):
        dispatch.w4a8_linear(**args)


def test_tensors_on_two_devices_are_refused(device: torch.device) -> None:
    args = moved(arguments(4, 64, 128, 128), device)
    args["qweight"] = args["qweight"].to("meta")
    with pytest.raises(ValueError, match="on one device, got xq on .* qweight on meta"):
        dispatch.w4a8_linear(**args)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (6144, 128), (1000, 14336), (333, 1111)])
@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 63, 64, 65, 129, 255, 1000, 4097])
def test_large(
    form: Family, m: int, n: int, k: int, group_size: GroupSize, device: torch.device
) -> None:
    bias, residual = m % 2 == 1, n % 3 == 0
    args = arguments(m, n, k, group_size, bias=bias, residual=residual, device=device)
    assert_equal_to_twin(form, args, device)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", FORMATS)
def test_offsets_beyond_32_bits(form: Family, group_size: GroupSize, device: torch.device) -> None:
    m, n, k = 160_000, 14336, 256  # m * n = 2.3e9 outputs
    args = arguments(m, n, k, group_size, device=device)
    y = multiply(form, args, device)
    for part in (slice(0, 3), slice(m - 3, m)):
        cut = {name: args[name][part] for name in ("xq", "token_scale", "token_sum")}
        assert torch.equal(y[part], reference({**args, **cut}))
    m, n, k = 160_000, 128, 14336  # m * k = 2.3e9 inputs
    args = arguments(1, n, k, group_size, device=device)
    last = {name: args[name] for name in ("xq", "token_scale", "token_sum")}
    args |= {name: torch.zeros((m, *t.shape[1:]), dtype=t.dtype, device=device)
             for name, t in last.items()}  # fmt: skip
    for name, t in last.items():
        args[name][-1:] = t
    y = multiply(form, args, device)
    assert torch.equal(y[-1:], reference({**args, **last}))
    assert not y[:-1].any()
