"""Parts of packed weights are the packed weights' own codes and scales, cut out."""

from __future__ import annotations

import pytest
import torch

from qoqc.ir.ops import quantize_act, w4a8_linear
from qoqc.parallel.cut import Cut, Index, part, with_empty_group
from qoqc.quant.weight import PackedWeight, expand_int8, quantize_weight
from qoqc.runtime.weights import GroupSize

N, K = 320, 600
CUTS = [
    Cut("rows", 0, 128),
    Cut("rows", 128, N),
    Cut("rows", 40, 200),  # neither end lies between tiles
    Cut("rows", 0, N),
    Cut("columns", 0, 256),
    Cut("columns", 384, K),  # the last group is not whole
    Cut("columns", 128, 512),
]


def packed(group_size: GroupSize) -> PackedWeight:
    torch.manual_seed(0)
    return quantize_weight(torch.randn(N, K) + 0.1, group_size)


def cut_out(whole: PackedWeight, cut: Cut) -> tuple[PackedWeight, int]:
    """The part, and how many bytes of the whole were read for it."""
    bytes_read = 0

    def read(field: str, index: Index) -> torch.Tensor:
        nonlocal bytes_read
        found = whole.tensors()[field][index]
        bytes_read += found.numel() * found.element_size()
        return found

    return part(read, N, K, whole.group_size == 128, cut), bytes_read


def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    parts = (weight.qweight, weight.channel_scale, weight.group_word, weight.channel_zero)
    y: torch.Tensor = w4a8_linear(*quantize_act(x), *parts, None, None, torch.float32)
    return y


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_part_holds_the_integers_of_the_whole(group_size: GroupSize, cut: Cut) -> None:
    whole = packed(group_size)
    found, _ = cut_out(whole, cut)
    assert torch.equal(expand_int8(found), expand_int8(whole)[cut.index])
    scale = whole.channel_scale[cut.index] if cut.axis == "rows" else whole.channel_scale
    assert torch.equal(found.channel_scale, scale)
    assert (found.out_features, found.in_features) == cut.shape(N, K)
    assert all(tensor.is_contiguous() for tensor in found.tensors().values())


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_part_reads_no_more_than_its_tiles(axis: str) -> None:
    whole = packed(128)
    total = sum(t.numel() * t.element_size() for t in whole.tensors().values())
    _, first = cut_out(whole, Cut(axis, 0, 256))
    _, second = cut_out(whole, Cut(axis, 256, N if axis == "rows" else K))
    # of a sum, every rank reads the scales of all output channels
    again = 0 if axis == "rows" else N * whole.channel_scale.element_size()
    assert first + second == total + again


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("cut", [Cut("columns", 0, 256), Cut("columns", 384, K)], ids=str)
def test_an_empty_group_changes_no_integer(group_size: GroupSize, cut: Cut) -> None:
    plain, _ = cut_out(packed(group_size), cut)
    found, _ = cut_out(packed(group_size), Cut("columns", cut.start, cut.stop, exact=True))
    width, padded = cut.width, cut.width + -cut.width % 128
    assert found.in_features == padded + 128
    integers = expand_int8(found)
    assert torch.equal(integers[:, :width], expand_int8(plain))
    assert not integers[:, padded:].any()
    torch.manual_seed(1)
    x = torch.randn(3, width)
    wide = torch.zeros(3, padded + 128)
    wide[:, :width], wide[:, padded] = x, x.abs().amax(-1)
    assert torch.equal(linear(wide, found), linear(x, plain))


def test_an_empty_group_behind_rows_that_fill_no_tile() -> None:
    whole = packed(-1)
    assert torch.equal(expand_int8(with_empty_group(whole))[:, :K], expand_int8(whole))


def test_parts_of_16_bit_weights_and_biases() -> None:
    weight, bias = torch.randn(6, 512), torch.randn(6)
    rows = Cut("rows", 2, 4)
    assert torch.equal(rows.of_weight(weight), weight[2:4])
    assert torch.equal(rows.of_bias(bias), bias[2:4])
    first, second = Cut("columns", 0, 256), Cut("columns", 256, 512, first=False)
    assert torch.equal(second.of_weight(weight), weight[:, 256:])
    assert torch.equal(first.of_bias(bias) + second.of_bias(bias), bias)
    own = first.of_weight(weight)
    assert own.untyped_storage().nbytes() == own.numel() * 4, "it keeps the whole alive"
