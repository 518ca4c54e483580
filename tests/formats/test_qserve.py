"""QServe's layout by its definition, lane by lane; imports that keep every bit; export and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qoqc.errors import Unsupported
from qoqc.formats import qserve, qserve_layout
from qoqc.formats.source import Source, load_source
from qoqc.quant.weight import (
    PackedWeight,
    dequantize_weight,
    expand_int8,
    quantize_weight,
)

Tensors = dict[str, torch.Tensor]


def codes_of(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)


def in_lanes(codes: torch.Tensor) -> torch.Tensor:
    """Codes as the kernel's lanes read them: byte b of lane l, as its source spells it out."""
    n, k = codes.shape
    stored = []
    for n0 in range(0, n, 32):
        for k0 in range(0, k, 32):
            for lane in range(32):
                for byte in range(16):
                    row = n0 + lane // 4 + 8 * ((byte >> 2) & 1)
                    column = k0 + 4 * (lane % 4) + (byte & 3) + 16 * (byte >> 3)
                    low, high = int(codes[row, column]), int(codes[row + 16, column])
                    stored.append(low | high << 4)
    return torch.tensor(stored, dtype=torch.uint8).view(torch.int8).view(n, k // 2)


def in_tensor_core_order(values: torch.Tensor) -> torch.Tensor:
    """[G, N] with every run of 32 channels in the order 0, 8, 16, 24, 1, 9, ..."""
    order = [base + j + 8 * i for base in range(0, values.shape[1], 32) for j in range(8)
             for i in range(4)]  # fmt: skip
    return values[:, order]


def grouped(codes: torch.Tensor, zero: torch.Tensor, s2: torch.Tensor, s1: torch.Tensor) -> Tensors:
    """The tensors of a g128 linear; zero and s2 [N, G], s1 [N]."""
    product = -(zero.int() * s2.int())
    return {
        "qweight": in_lanes(codes),
        "s1_scales": s1.half(),
        "s2_scales": in_tensor_core_order(s2.t()).to(torch.int8),
        "s2_zeros": in_tensor_core_order(product.t()).to(torch.int8),  # wraps modulo 256
    }


def a_grouped(n: int = 64, k: int = 256) -> tuple[Tensors, torch.Tensor]:
    """A linear with grids of every scale that fits, and its fp32 values by the definition."""
    generator = torch.Generator().manual_seed(1)
    s2 = torch.randint(1, 17, (n, k // 128), generator=generator)
    low, high = (15 - 127 // s2).clamp(min=0), (128 // s2).clamp(max=15)
    zero = low + (torch.rand(s2.shape, generator=generator) * (high - low + 1)).long()
    codes = codes_of(n, k)
    s1 = (torch.rand(n, generator=generator) * 0.01 + 1e-3).half()
    values = codes.view(n, -1, 128).long() - zero[..., None]
    values = (values * s2[..., None]).view(n, k).float() * s1.float()[:, None]
    return grouped(codes, zero, s2, s1), values


def a_per_channel(n: int = 32, k: int = 96) -> tuple[Tensors, torch.Tensor]:
    """A linear whose zero points have all values, and its fp32 values by the definition."""
    generator = torch.Generator().manual_seed(2)
    zero = torch.arange(n) % 16
    s1 = (torch.rand(n, generator=generator) * 0.01 + 1e-3).half()
    codes, szeros = codes_of(n, k), zero.half() * s1
    values = codes.float() * s1.float()[:, None] - szeros.float()[:, None]
    return {"qweight": in_lanes(codes), "s1_scales": s1, "s1_szeros": szeros}, values


def write(directory: Path, linears: dict[str, Tensors], **others: torch.Tensor) -> Path:
    directory.mkdir(exist_ok=True)
    tensors = {f"{name}.{k}": t for name, linear in linears.items() for k, t in linear.items()}
    save_file({k: t.contiguous() for k, t in {**tensors, **others}.items()},
              directory / "model.safetensors")  # fmt: skip
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def load(tmp_path: Path, linear: Tensors) -> Source:
    return load_source(write(tmp_path / "source", {"up": linear}))


def same(a: PackedWeight, b: PackedWeight) -> bool:
    x, y = a.tensors(), b.tensors()
    sizes = (a.out_features, a.in_features) == (b.out_features, b.in_features)
    equal = all(x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]) for name in x)
    return sizes and x.keys() == y.keys() and equal


def test_unpack_is_the_lanes_definition() -> None:
    codes = codes_of(64, 96)
    assert torch.equal(qserve_layout.unpack(in_lanes(codes)), codes)
    assert torch.equal(qserve_layout.pack(codes), in_lanes(codes))


def test_unshuffle_is_the_order_of_the_definition() -> None:
    values = torch.arange(2 * 96).view(2, 96)
    assert torch.equal(qserve_layout.unshuffle(in_tensor_core_order(values)), values)
    assert torch.equal(qserve_layout.shuffle(values), in_tensor_core_order(values))


@pytest.mark.parametrize("n, k", [(32, 128), (64, 256), (160, 128)])
def test_a_grouped_linear_is_imported_bit_for_bit(n: int, k: int, tmp_path: Path) -> None:
    tensors, values = a_grouped(n, k)
    source = load(tmp_path, tensors)
    packed = source.packed["up.weight"]
    assert torch.equal(dequantize_weight(packed), values)
    (change,) = source.report
    assert (change.name, change.requantized, change.error) == ("up.weight", False, 0.0)
    assert (source.kind, source.group_size, source.tensors) == ("qserve", 128, {})


def test_a_zero_outside_our_range_moves_with_its_codes(tmp_path: Path) -> None:
    # QServe only needs the codes that occur within int8: here z*s > 128, and (15-z)*s > 127
    s2 = torch.tensor([[16], [10]]).repeat_interleave(16, 0)
    zero = torch.tensor([[15], [0]]).repeat_interleave(16, 0)
    codes = codes_of(32, 128)
    codes[:16] = codes[:16].clamp(min=7)  # (7 - 15) * 16 = -128
    codes[16:] = codes[16:].clamp(max=12)  # 12 * 10 = 120
    s1 = torch.full((32,), 0.5)
    packed = load(tmp_path, grouped(codes, zero, s2, s1)).packed["up.weight"]
    expected = (codes.long() - zero) * s2
    assert torch.equal(expand_int8(packed).long(), expected)
    assert packed.group_word is not None
    scale, product = packed.group_word & 255, 128 - (packed.group_word >> 8)
    assert (product <= 128).all()
    assert (15 * scale - product <= 127).all()


def test_a_group_of_scale_zero_is_zeros(tmp_path: Path) -> None:
    s2 = torch.full((32, 2), 3)
    s2[5, 1] = 0
    codes = codes_of(32, 256)
    tensors = grouped(codes, torch.full_like(s2, 7), s2, torch.ones(32))
    source = load(tmp_path, tensors)
    expected = (codes.view(32, 2, 128).long() - 7) * s2[..., None]
    assert torch.equal(expand_int8(source.packed["up.weight"]).long(), expected.view(32, 256))
    assert source.report[0].error == 0.0


def test_a_scale_beyond_our_grid_is_rounded_anew_and_reported(tmp_path: Path) -> None:
    s2 = torch.full((32, 2), 16)
    s2[3, 1] = 17
    codes = codes_of(32, 256).clamp(1, 14)
    tensors = grouped(codes, torch.full_like(s2, 8), s2, torch.full((32,), 0.01))
    source = load(tmp_path, tensors)
    (change,) = source.report
    assert change.requantized
    assert 0 < change.error < 0.1
    assert source.packed["up.weight"].group_size == 128


def test_a_per_channel_linear_keeps_its_codes(tmp_path: Path) -> None:
    tensors, values = a_per_channel()
    source = load(tmp_path, tensors)
    packed = source.packed["up.weight"]
    zero, scale = torch.arange(32) % 16, tensors["s1_scales"].float()
    assert packed.channel_zero is not None
    assert torch.equal(packed.channel_zero.long(), zero)
    exact = (codes_of(32, 96).long() - zero[:, None]).float() * scale[:, None]
    assert torch.equal(dequantize_weight(packed), exact)
    (change,) = source.report
    assert not change.requantized
    # fp16 rounds z*s by 2**-11 of it, at most 15 steps; the values are steps of about 5 RMS
    assert 0 < change.error < 15 * 2**-11
    assert (exact - values).abs().max() <= 15 * 2**-11 * scale.max()
    assert source.group_size == -1


def test_a_zero_point_between_two_codes_is_rounded_anew(tmp_path: Path) -> None:
    tensors, values = a_per_channel()
    tensors["s1_szeros"] = tensors["s1_szeros"] + tensors["s1_scales"] * 0.3
    source = load(tmp_path, tensors)
    (change,) = source.report
    assert change.requantized
    assert source.group_size == -1
    got = dequantize_weight(source.packed["up.weight"])
    shifted = values - 0.3 * tensors["s1_scales"].float()[:, None]
    step = tensors["s1_scales"].float().max()
    assert (got - shifted).abs().max() < 1.2 * step


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("n, k", [(32, 128), (288, 384)])
def test_import_of_an_export_is_the_weight(group_size: int, n: int, k: int, tmp_path: Path) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    weight[5] = 0
    made = quantize_weight(weight, group_size)
    # QServe keeps channel scales in fp16
    packed = PackedWeight(
        made.qweight, made.channel_scale.half().float(), made.group_word, made.channel_zero, n, k
    )
    tensors = qserve.write("up", packed)
    assert {t.dtype for t in tensors.values()} == {torch.int8, torch.float16}
    again = load(tmp_path, tensors).packed["up.weight"]
    assert same(again, packed)
    assert not same(again, made), "fp32 scales are rounded, or this test compares nothing"
    exported = qserve.write("up", again)
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("make", [a_grouped, a_per_channel])
def test_export_of_an_import_is_the_file(make: type, tmp_path: Path) -> None:
    tensors, _ = make()
    exported = qserve.write("up", load(tmp_path, tensors).packed["up.weight"])
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "group_size, n, k, scale, reason",
    [
        (128, 48, 128, 1.0, "multiples of 32 and 128"),
        (128, 32, 192, 1.0, "multiples of 32 and 128"),
        (-1, 32, 80, 1.0, "multiples of 32 and 32"),
        (128, 32, 128, 1e-6, "normal range of fp16"),
        (128, 32, 128, 1e8, "normal range of fp16"),
        (-1, 32, 128, 1e5, "overflows fp16"),
    ],
)
def test_what_qserve_cannot_hold_is_refused(
    group_size: int, n: int, k: int, scale: float, reason: str
) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * scale
    with pytest.raises(Unsupported, match=f"up: .*{reason}"):
        qserve.write("up", quantize_weight(weight, group_size))


def broken(name: str, change: str) -> tuple[Tensors, str]:
    tensors, _ = a_per_channel() if name == "s1_szeros" else a_grouped()
    tensor = tensors[name]
    if change == "gone":
        del tensors[name]
    elif change == "cut":
        tensors[name] = tensor[:-1]
    elif change == "dtype":
        tensors[name] = tensor.float()
    elif change == "nan":
        tensor[0] = torch.nan
    else:
        tensor[0, 0] = int(change)
    return tensors, f"up.{name}"


@pytest.mark.parametrize(
    "name, change",
    [
        *[(n, c) for n in ("qweight", "s2_zeros", "s1_szeros") for c in ("gone", "cut", "dtype")
          if (n, c) != ("s1_szeros", "gone")],
        *[("s1_scales", c) for c in ("cut", "dtype", "nan")],
        ("s1_szeros", "nan"),
        ("s2_scales", "gone"),
        ("s2_scales", "-1"),
        ("s2_scales", "18"),
        ("s2_zeros", "113"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(name: str, change: str, tmp_path: Path) -> None:
    tensors, named = broken(name, change)
    if name == "s1_scales" and change == "cut":
        named = "up.qweight"  # 63 channels: the next tensor does not fit
    with pytest.raises(Unsupported, match=named):
        load(tmp_path, tensors)


def test_values_that_leave_int8_are_refused(tmp_path: Path) -> None:
    s2 = torch.full((32, 1), 16)
    tensors = grouped(codes_of(32, 128), torch.zeros_like(s2), s2, torch.ones(32))
    with pytest.raises(Unsupported, match="up.qweight leaves int8"):
        load(tmp_path, tensors)


def test_kv_scales_of_qserve_are_dropped_and_other_tensors_kept(tmp_path: Path) -> None:
    tensors, _ = a_grouped()
    table, norm = torch.rand(64, 4), torch.ones(64)
    names = {"embed.weight": table, "norm.weight": norm}
    others = {"attn.kv_scale_quant_orig": torch.ones(2), "attn.rotary_emb.inv_freq": torch.ones(2)}
    source = load_source(write(tmp_path / "source", {"up": tensors}, **names, **others))
    assert set(source.dropped) == others.keys()
    assert source.tensors.keys() == names.keys()
    assert torch.equal(source.tensors["embed.weight"], table)


def test_norm_weights_that_qserve_would_not_load_are_refused(tmp_path: Path) -> None:
    tensors, _ = a_grouped()
    norm = torch.ones(64)
    norm[3] = 1.5
    with pytest.raises(Unsupported, match="input_norm.weight is not 1 throughout"):
        load_source(write(tmp_path / "source", {"up": tensors}, **{"input_norm.weight": norm}))
