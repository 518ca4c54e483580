"""AWQ, GPTQ and compressed-tensors linears, built word by word: exact values, named damage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qoqc.errors import Unsupported
from qoqc.formats import awq, compressed_tensors, gptq
from qoqc.formats.files import TensorFiles
from qoqc.formats.layer import Found, Layer
from qoqc.formats.source import Source, load_source
from qoqc.quant.weight import dequantize_weight

Tensors = dict[str, torch.Tensor]
N, K, GROUPS = 32, 256, 2


def whole(top: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, shape, generator=generator)


def scales(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.rand(*shape, generator=generator) * 0.01 + 1e-3).half()


def words(rows: list[list[int]]) -> torch.Tensor:
    """Each row of nibbles, lowest first and eight to a word, as int32."""
    packed = [
        [sum(row[i + j] << (4 * j) for j in range(8)) for i in range(0, len(row), 8)]
        for row in rows
    ]
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in packed]
    return torch.tensor(signed, dtype=torch.int32)


def awq_interleaved(values: torch.Tensor) -> torch.Tensor:
    """Rows with every eight columns in AWQ's order."""
    order = [base + i for base in range(0, values.shape[1], 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return words(values[:, order].tolist())


def a_awq() -> tuple[Tensors, torch.Tensor]:
    q, z, s = whole(16, K, N), whole(16, GROUPS, N, seed=1), scales(GROUPS, N)
    tensors = {"qweight": awq_interleaved(q), "qzeros": awq_interleaved(z), "scales": s}
    values = torch.stack([(q[k] - z[k // 128]) * s[k // 128].float() for k in range(K)], dim=1)
    return tensors, values


def a_gptq(act_order: bool = False, offset: int = 1) -> tuple[Tensors, torch.Tensor]:
    q, s = whole(16, K, N), scales(GROUPS, N)
    z = whole(15, GROUPS, N, seed=1) + offset
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3))
    group = (order if act_order else torch.arange(K)) // 128
    tensors = {
        "qweight": words(q.t().tolist()).t().contiguous(),
        "qzeros": words((z - offset).tolist()),
        "scales": s,
        "g_idx": group.int(),
    }
    values = torch.stack([(q[k] - z[group[k]]) * s[group[k]].float() for k in range(K)], dim=1)
    return tensors, values


def a_compressed(groups: int = GROUPS) -> tuple[Tensors, torch.Tensor]:
    q, s = whole(16, N, K) - 8, scales(N, groups).bfloat16()
    tensors = {
        "weight_packed": words((q + 8).tolist()),
        "weight_scale": s,
        "weight_shape": torch.tensor([N, K]),
    }
    return tensors, q * s.float().repeat_interleave(K // groups, 1)


def ct_config(**weights: Any) -> dict[str, Any]:
    scheme = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group",
              "group_size": 128, **weights}  # fmt: skip
    activations = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
MAKERS: dict[str, tuple[Callable[[], tuple[Tensors, torch.Tensor]], dict[str, Any]]] = {
    "awq": (a_awq, AWQ),
    "gptq": (a_gptq, GPTQ),
    "gptq act-order": (lambda: a_gptq(act_order=True), {**GPTQ, "desc_act": True}),
    "gptq_v2": (lambda: a_gptq(offset=0), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "compressed-tensors": (a_compressed, ct_config()),
    "compressed-tensors per channel": (lambda: a_compressed(1), ct_config(strategy="channel")),
    "compressed-tensors g64": (lambda: a_compressed(4), ct_config(group_size=64)),
}


def read(directory: Path, tensors: Tensors, function: Callable[[Layer], Found]) -> Any:
    directory.mkdir(exist_ok=True)
    save_file({f"m.up.{name}": t for name, t in tensors.items()}, directory / "x.safetensors")
    with TensorFiles(directory) as files:
        return function(Layer(files, "m.up")).values


def load(directory: Path, tensors: Tensors, config: dict[str, Any], **others: Any) -> Source:
    directory.mkdir(exist_ok=True)
    named = {f"m.up.{name}": t for name, t in tensors.items()}
    save_file({**named, **others}, directory / "model.safetensors")
    text = json.dumps({"model_type": "llama", "quantization_config": config})
    (directory / "config.json").write_text(text)
    return load_source(directory)


def test_values_are_exact(tmp_path: Path) -> None:
    readers: dict[str, Callable[[Layer], Found]] = {
        "awq": awq.read,
        "gptq": lambda layer: gptq.read(layer, 1),
        "gptq act-order": lambda layer: gptq.read(layer, 1),
        "gptq_v2": lambda layer: gptq.read(layer, 0),
        "compressed-tensors": compressed_tensors.read,
        "compressed-tensors per channel": compressed_tensors.read,
        "compressed-tensors g64": compressed_tensors.read,
    }
    assert readers.keys() == MAKERS.keys()
    for name, function in readers.items():
        tensors, values = MAKERS[name][0]()
        assert torch.equal(read(tmp_path / name, tensors, function), values), name


def test_a_gptq_layer_without_g_idx_has_neighbouring_groups(tmp_path: Path) -> None:
    tensors, values = a_gptq()
    del tensors["g_idx"]
    got = read(tmp_path / "x", tensors, lambda layer: gptq.read(layer, 1))
    assert torch.equal(got, values)


def test_int_quantized_and_act_order_of_compressed_tensors(tmp_path: Path) -> None:
    tensors, values = a_compressed()
    plain = {
        "weight": (whole(16, N, K) - 8).to(torch.int8),
        "weight_scale": tensors["weight_scale"],
    }
    assert torch.equal(read(tmp_path / "plain", plain, compressed_tensors.read), values)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(4))
    tensors["weight_g_idx"] = (order // 128).int()
    expected = (whole(16, N, K) - 8) * tensors["weight_scale"].float()[:, order // 128]
    assert torch.equal(read(tmp_path / "act", tensors, compressed_tensors.read), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_is_rounded_to_our_grid_and_says_by_how_much(
    name: str, tmp_path: Path
) -> None:
    make, config = MAKERS[name]
    tensors, values = make()
    bias, norm = torch.rand(N), torch.rand(K)
    others = {"m.up.bias": bias, "norm.weight": norm}
    source = load(tmp_path / "source", tensors, config, **others)
    assert source.kind == config["quant_method"]
    assert source.config == {"model_type": "llama"}
    assert source.tensors.keys() == others.keys()
    (change,) = source.report
    got = dequantize_weight(source.packed["m.up.weight"])
    expected = float((got - values).norm() / values.norm())
    assert change.requantized
    assert change.error == pytest.approx(expected, rel=1e-4)  # summed in another order
    # act-order mixes groups, and ours are not smaller than 128: such weights are rounded anew
    anew = "act-order" in name or "g64" in name
    assert (change.error > 0.03) == anew
    assert change.error < 0.15


@pytest.mark.parametrize(
    "config, reason",
    [
        ({**AWQ, "bits": 8}, "AWQ with bits=8"),
        ({**AWQ, "version": "gemv"}, "AWQ version 'gemv'"),
        ({**GPTQ, "bits": 3}, "GPTQ with bits=3"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "format 'marlin'"),
        ({**GPTQ, "is_marlin_format": True}, "format 'marlin'"),
        (ct_config(num_bits=8), "num_bits=8"),
        (ct_config(symmetric=False), "symmetric=False"),
        (ct_config(type="float"), "type='float'"),
        (ct_config(strategy="block"), "strategy='block'"),
        ({**ct_config(), "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        ({**ct_config(), "config_groups": {}}, "config_groups"),
        ({**ct_config(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
        ({**ct_config(), "transform_config": {"config_groups": {"r1": {}}}}, "transform_config"),
        ({**ct_config(), "config_groups": {"group_0": [4]}}, "group_0 in config.json is not"),
        ({**ct_config(), "sparsity_config": "dense"}, "sparsity_config in config.json is not"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({}, "no 4-bit weights|'none'"),
    ],
)
def test_other_variants_are_refused_by_name(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=reason):
        load(tmp_path / "source", a_awq()[0], config)


def damaged(name: str, tensor: str, change: str) -> tuple[Tensors, dict[str, Any]]:
    make, config = MAKERS[name]
    tensors, _ = make()
    found = tensors[tensor]
    if change == "gone":
        del tensors[tensor]
    elif change == "cut":
        tensors[tensor] = found[:-1].contiguous()
    elif change == "dtype":
        tensors[tensor] = found.double()
    else:
        found.view(-1)[0] = float(change)
    return tensors, config


@pytest.mark.parametrize("change", ["gone", "cut", "dtype"])
@pytest.mark.parametrize(
    "name, tensor",
    [
        ("awq", "qzeros"),
        ("awq", "scales"),
        ("gptq", "qweight"),
        ("gptq", "qzeros"),
        ("gptq", "scales"),
        ("compressed-tensors", "weight_packed"),
        ("compressed-tensors", "weight_shape"),
    ],
)
def test_missing_and_misshapen_tensors_are_refused(
    name: str, tensor: str, change: str, tmp_path: Path
) -> None:
    tensors, config = damaged(name, tensor, change)
    with pytest.raises(Unsupported, match=r"m\.up\.|no tensor is called \*\.qweight"):
        load(tmp_path / "source", tensors, config)


@pytest.mark.parametrize(
    "name, tensor, change, reason",
    [
        ("awq", "scales", "nan", "m.up.scales holds NaN"),
        ("gptq", "scales", "inf", "m.up.scales holds NaN or infinite"),
        ("gptq", "g_idx", "2", "m.up.g_idx is not within 0..1"),
        ("gptq", "g_idx", "-1", "m.up.g_idx is not within 0..1"),
        ("gptq", "qzeros", "-1", "m.up.qzeros has a zero point 0"),
        ("compressed-tensors", "weight_shape", "-32", "m.up.weight_shape"),
        ("compressed-tensors", "weight_shape", "31", "m.up.weight_packed"),
    ],
)
def test_impossible_values_are_refused(
    name: str, tensor: str, change: str, reason: str, tmp_path: Path
) -> None:
    tensors, config = damaged(name, tensor, change)
    with pytest.raises(Unsupported, match=reason):
        load(tmp_path / "source", tensors, config)


@pytest.mark.parametrize("name", MAKERS)
def test_flipped_bits_are_an_error_or_other_weights(name: str, tmp_path: Path) -> None:
    make, config = MAKERS[name]
    directory = tmp_path / "source"
    load(directory, make()[0], config)
    file = directory / "model.safetensors"
    good, chance = file.read_bytes(), random.Random(name)
    header = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for turn in range(60):
        spoiled = bytearray(good)
        # the header is the smaller part: every other flip is there
        spoiled[chance.randrange(8, header if turn % 2 else len(good))] ^= 1 << chance.randrange(8)
        file.write_bytes(bytes(spoiled))
        try:
            source = load_source(directory)
        except Unsupported:
            refused += 1
        else:
            assert torch.isfinite(dequantize_weight(source.packed["m.up.weight"])).all()
    assert 15 < refused < 60


def test_scales_that_overflow_are_refused(tmp_path: Path) -> None:
    tensors, _ = a_compressed()
    tensors["weight_scale"][3, 1] = 3e38
    with pytest.raises(Unsupported, match="m.up.weight overflows fp32"):
        load(tmp_path / "source", tensors, ct_config())


def test_more_is_refused_than_symmetric_int4_in_compressed_tensors(tmp_path: Path) -> None:
    tensors, _ = a_compressed()
    with pytest.raises(Unsupported, match="weight_zero_point is there"):
        zero_points = {"weight_zero_point": torch.zeros(4, GROUPS, dtype=torch.int32)}
        load(tmp_path / "zeros", {**tensors, **zero_points}, ct_config())
    plain = {"weight": torch.full((N, K), 8, dtype=torch.int8)}
    with pytest.raises(Unsupported, match=r"m.up.weight is not within -8\.\.7"):
        load(tmp_path / "int8", {**plain, "weight_scale": tensors["weight_scale"]}, ct_config())
