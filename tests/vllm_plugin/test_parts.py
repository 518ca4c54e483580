"""Where tensors go: needs nothing of vLLM."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from qoqc.artifact.manifest import WeightEntry
from qoqc.errors import ArtifactError, Unsupported
from qoqc.quant.weight import PackedWeight, quantize_weight
from qoqc.vllm_plugin.parts import FieldLoader, Part, joined, require_finite, require_one_kind


def packed_parts(
    sizes: list[int], k: int, group_size: Literal[128, -1]
) -> tuple[torch.Tensor, list[PackedWeight], list[Part]]:
    """A weight, its rows packed in parts, and what a manifest says of them."""
    generator = torch.Generator().manual_seed(sum(sizes) + k)
    weight = torch.randn(sum(sizes), k, generator=generator)
    packed = [quantize_weight(rows, group_size) for rows in weight.split(sizes)]
    parts = [
        Part(f"part{i}.weight", WeightEntry.of(each, False, torch.bfloat16))
        for i, each in enumerate(packed)
    ]
    return weight, packed, parts


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("sizes", [[256, 128, 128], [128, 64, 64], [40, 300], [70]])
def test_parts_become_the_packed_weight_of_all_rows(
    sizes: list[int], group_size: Literal[128, -1]
) -> None:
    weight, packed, parts = packed_parts(sizes, 200, group_size)
    whole = quantize_weight(weight, group_size)
    params = {}
    for field in whole.tensors():
        loader = FieldLoader(field, parts)
        params[field] = torch.full(loader.shape, 7, dtype=loader.dtype)
        for i in reversed(range(len(sizes))):
            tensor = packed[i].tensors()[field]
            loader.load(params[field], tensor, i if len(sizes) > 1 else None)
        assert loader.missing() == []
    found = joined(params, parts)
    assert found.keys() == whole.tensors().keys()
    for field, tensor in whole.tensors().items():
        assert torch.equal(found[field], tensor), field
        assert found[field].is_contiguous()
    if all(size % 128 == 0 for size in sizes[:-1]):
        assert all(found[field] is params[field] for field in found)


def test_shards_have_names_and_may_come_again() -> None:
    _, packed, parts = packed_parts([128, 64, 64], 128, 128)
    loader = FieldLoader("channel_scale", parts)
    param = torch.zeros(loader.shape)
    for name, each in zip("vq", (packed[2], packed[0]), strict=True):
        loader.load(param, each.channel_scale, name)
    assert loader.missing() == ["part1.channel_scale"]
    loader.load(param, packed[1].channel_scale, "k")
    assert loader.missing() == []
    assert torch.equal(param, torch.cat([each.channel_scale for each in packed]))
    loader.load(param, packed[0].channel_scale, "q")  # weights are loaded once more
    assert loader.missing() == ["part1.channel_scale", "part2.channel_scale"]


@pytest.mark.parametrize("shard", [None, 3, -1, "x", (0, 1)])
def test_other_shards_are_refused(shard: int | str | None) -> None:
    _, packed, parts = packed_parts([128, 64, 64], 128, 128)
    loader = FieldLoader("channel_scale", parts)
    with pytest.raises(Unsupported, match="qoqc serve"):
        loader.load(torch.zeros(loader.shape), packed[0].channel_scale, shard)


def test_a_tensor_of_another_shape_or_dtype_is_refused() -> None:
    _, packed, parts = packed_parts([128, 64], 128, 128)
    loader = FieldLoader("channel_scale", parts)
    param = torch.zeros(loader.shape)
    with pytest.raises(ArtifactError, match=r"part1\.channel_scale is torch.float32 \[128\]"):
        loader.load(param, packed[0].channel_scale, 1)
    with pytest.raises(ArtifactError, match=r"expected torch.float32 \[64\]"):
        loader.load(param, packed[1].channel_scale.half(), 1)
    assert not param.any()


def test_parts_of_two_kinds_are_refused() -> None:
    _, _, first = packed_parts([128], 128, 128)
    _, _, other = packed_parts([128], 128, -1)
    _, _, wider = packed_parts([128], 256, 128)
    require_one_kind(first + first, "qkv_proj")
    with pytest.raises(Unsupported, match="qkv_proj.*group_size 128.*with -1"):
        require_one_kind(first + other, "qkv_proj")
    with pytest.raises(Unsupported, match="in_features 128.*with 256"):
        require_one_kind(first + wider, "qkv_proj")


def test_a_scale_that_is_not_finite_is_refused() -> None:
    _, packed, parts = packed_parts([128], 128, 128)
    require_finite(packed[0].channel_scale, parts)
    with pytest.raises(ArtifactError, match=r"part0\.weight is not finite"):
        require_finite(packed[0].channel_scale * torch.inf, parts)
