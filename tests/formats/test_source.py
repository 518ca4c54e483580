"""Telling formats apart, and what a Source says besides its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qoqc.errors import Unsupported
from qoqc.formats import qserve
from qoqc.formats.source import load_source, relative_rms
from qoqc.quant.weight import quantize_weight

Tensors = dict[str, torch.Tensor]


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))


def linear(name: str, group_size: int = 128) -> Tensors:
    tensors = qserve.write(name, quantize_weight(weight(), group_size))
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def write(directory: Path, tensors: Tensors, **config: Any) -> Path:
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "qoq"}}])
def test_qserve_is_known_by_its_tensors(config: dict[str, Any], tmp_path: Path) -> None:
    source = load_source(write(tmp_path, linear("up"), **config))
    assert (source.kind, source.config) == ("qserve", {"model_type": "llama"})


def test_every_linear_is_counted_and_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    directory = write(tmp_path, {**linear("b"), **linear("a")})
    source = load_source(directory, progress=lambda done, all_: seen.append((done, all_)))
    assert seen == [(1, 2), (2, 2)]
    assert [change.name for change in source.report] == ["a.weight", "b.weight"]
    assert source.packed.keys() == {"a.weight", "b.weight"}


def test_a_mixture_of_formats_has_no_group_size(tmp_path: Path) -> None:
    source = load_source(write(tmp_path, {**linear("a"), **linear("b", -1)}))
    assert {name: p.group_size for name, p in source.packed.items()} == {
        "a.weight": 128,
        "b.weight": -1,
    }
    with pytest.raises(Unsupported, match="some linears are quantized per group"):
        _ = source.group_size


def test_what_is_rounded_anew_takes_the_group_size_asked_for(tmp_path: Path) -> None:
    tensors = {
        "up.weight": torch.ones(32, 256, dtype=torch.int8),
        "up.weight_scale": torch.full((32, 2), 0.5),
    }
    scheme = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"weights": scheme}},
    }
    directory = write(tmp_path, tensors, quantization_config=quantization)
    for group_size in (128, -1):
        assert load_source(directory, group_size).group_size == group_size


@pytest.mark.parametrize(
    "tensors, reason",
    [
        ({"up.weight": weight()}, "has no 4-bit weights.*qoqc compile"),
        ({"up.weight.channel_scale": torch.ones(2)}, "is an artifact of qoqc already"),
        ({**linear("up"), "up.weight": weight()}, "holds up.weight both quantized and as it is"),
    ],
)
def test_other_checkpoints_are_refused(tensors: Tensors, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=reason):
        load_source(write(tmp_path, tensors))


@pytest.mark.parametrize("text, reason", [
    (None, "no config.json"),
    ("{", "config.json is damaged"),
    ("[" * 100_000, "config.json is damaged"),
    ("[]", "config.json is damaged"),
    ('{"quantization_config": 4}', "quantization_config is not an object"),
])  # fmt: skip
def test_a_bad_config_is_named(text: str | None, reason: str, tmp_path: Path) -> None:
    write(tmp_path, linear("up"))
    if text is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(Unsupported, match=reason):
        load_source(tmp_path)


def test_relative_rms() -> None:
    zeros, ones = torch.zeros(2, 8), torch.ones(2, 8)
    assert relative_rms(zeros, zeros) == 0.0
    assert relative_rms(1.5 * ones, ones) == 0.5
    assert relative_rms(ones, zeros) == float("inf")
