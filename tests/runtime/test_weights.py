"""WeightStore: packed once, shared, regrouped exactly, never stale, released for good."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from qoqc.errors import StaleWeights, Unsupported
from qoqc.quant.glu import interleaved
from qoqc.quant.weight import dequantize_weight, quantize_weight
from qoqc.runtime.weights import WeightRef, WeightStore


def refs(*rows: int, k: int = 64) -> list[WeightRef]:
    generator = torch.Generator().manual_seed(len(rows))
    weights = [torch.randn(n, k, generator=generator) for n in rows]
    return [WeightRef(Parameter(w, False), False, f"layer.{i}") for i, w in enumerate(weights)]


def dense(store: WeightStore, group: list[WeightRef], group_size: Any = 128) -> torch.Tensor:
    return dequantize_weight(store.bundle(group, group_size).packed)


def fresh(group: list[WeightRef], group_size: Any = 128) -> torch.Tensor:
    """What packing from scratch gives."""
    return torch.cat([dequantize_weight(quantize_weight(ref.dense(), group_size)) for ref in group])


@pytest.mark.parametrize("group_size", [128, -1])
def test_bundle_stacks_rows(group_size: Any) -> None:
    group = refs(48, 32, 64)
    assert torch.equal(dense(WeightStore(), group, group_size), fresh(group, group_size))


def test_same_group_is_the_same_bundle() -> None:
    store, group = WeightStore(), refs(48, 32)
    assert store.bundle(group, 128) is store.bundle(group, 128)
    assert store.bundle(group, 128) is not store.bundle(group, -1)


@pytest.mark.parametrize("order", [[0], [1], [1, 0], [2, 0, 1], [0, 1, 2]])
def test_regrouping_is_exact(order: list[int]) -> None:
    """Also where the 16-bit values are gone: rows are cut from the packed form."""
    store, group = WeightStore(), refs(48, 32, 64)
    chosen = [group[i] for i in order]
    expected, alone = fresh(chosen), fresh(group[:1])
    store.release(store.bundle(group, 128), [ref.param for ref in group])
    assert torch.equal(dense(store, chosen), expected)
    assert torch.equal(dense(store, group[:1]), alone)


def test_transposed() -> None:
    param = Parameter(torch.randn(64, 48), False)
    ref = WeightRef(param, True, "conv")
    packed = WeightStore().bundle([ref], 128).packed
    assert (packed.out_features, packed.in_features) == (48, 64)
    assert torch.equal(dequantize_weight(packed), fresh([ref]))


def scale_in_place(param: Parameter) -> None:
    param.mul_(2)


def copy_into(param: Parameter) -> None:
    param.copy_(torch.randn_like(param))


def repoint(param: Parameter) -> None:
    param.data = param.data * 2


@pytest.mark.parametrize("change", [scale_in_place, copy_into, repoint])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_changed_weight_is_packed_again_in_place(change: Any, changed: int) -> None:
    store, group = WeightStore(), refs(48, 32, 64)
    bundle = store.bundle(group, 128)
    bundle.int8()
    addresses = [tensor.data_ptr() for tensor in bundle.tensors().values()]
    change(group[changed].param)
    assert store.bundle(group, 128) is bundle
    assert torch.equal(dequantize_weight(bundle.packed), fresh(group))
    assert torch.equal(bundle.int8().float() * bundle.packed.channel_scale[:, None], fresh(group))
    assert [tensor.data_ptr() for tensor in bundle.tensors().values()] == addresses


def test_another_parameter_gets_its_own_bundle() -> None:
    store, (first, second) = WeightStore(), refs(48, 48)
    one, two = store.bundle([first], 128), store.bundle([second], 128)
    assert one is not two
    assert torch.equal(dequantize_weight(one.packed), fresh([first]))


def test_release_frees_storage_and_reads_nan() -> None:
    store, group = WeightStore(), refs(48, 32)
    storages = [StorageWeakRef(ref.param.untyped_storage()) for ref in group]
    expected = fresh(group)
    bundle = store.bundle(group, 128)
    assert not any(storage.expired() for storage in storages)
    store.release(bundle, [ref.param for ref in group])
    gc.collect()
    assert all(storage.expired() for storage in storages)
    for ref in group:
        assert store.is_released(ref.param)
        assert ref.param.isnan().all()
        assert ref.param.shape[1] == 64
    first, second = (ref.param.untyped_storage().data_ptr() for ref in group)
    assert first == second
    assert store.bundle(group, 128) is bundle
    assert torch.equal(dequantize_weight(bundle.packed), expected)


def test_release_leaves_other_formats_valid() -> None:
    store, group = WeightStore(), refs(48)
    expected = fresh(group, -1)
    store.bundle(group, -1)
    store.release(store.bundle(group, 128), [group[0].param])
    assert torch.equal(dense(store, group, -1), expected)


@pytest.mark.parametrize("change", [scale_in_place, copy_into])
def test_writing_a_released_weight_is_an_error(change: Any) -> None:
    store, group = WeightStore(), refs(48, 32)
    store.release(store.bundle(group, 128), [ref.param for ref in group])
    change(group[1].param)
    with pytest.raises(StaleWeights, match=r"layer\.1 has no 16-bit values any more"):
        store.bundle(group, 128)


def test_new_storage_for_a_released_weight_is_packed() -> None:
    store, group = WeightStore(), refs(48)
    store.release(store.bundle(group, 128), [group[0].param])
    group[0].param.data = torch.randn(48, 64)
    assert torch.equal(dense(store, group), fresh(group))


def test_released_weight_in_another_format_is_an_error() -> None:
    store, group = WeightStore(), refs(48)
    store.release(store.bundle(group, 128), [group[0].param])
    with pytest.raises(StaleWeights, match="asked for in another group size"):
        store.bundle(group, -1)


def test_adopted_weights_win_over_the_values() -> None:
    store, (ref, other) = WeightStore(), refs(48, 48)
    store.adopt(ref, quantize_weight(other.dense(), 128))
    assert torch.equal(dense(store, [ref]), fresh([other]))


def test_entries_die_with_their_parameter() -> None:
    store, group = WeightStore(), refs(48)
    bundle = weakref.ref(store.bundle(group, 128))
    assert bundle() is not None
    del group
    gc.collect()
    assert bundle() is None


def test_nan_weight_is_named() -> None:
    group = refs(48)
    group[0].param[3, 5] = torch.nan
    with pytest.raises(Unsupported, match=r"layer\.0: the weight holds NaN or infinite values"):
        WeightStore().bundle(group, 128)


def test_inference_parameters() -> None:
    with torch.inference_mode():
        ref = WeightRef(Parameter(torch.randn(48, 64), False), False, "made in inference mode")
    assert torch.equal(dense(WeightStore(), [ref]), fresh([ref]))


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("sizes", [(48, 48), (128, 128), (200, 200), (96,)])
def test_rows_in_turns(sizes: tuple[int, ...], group_size: Any) -> None:
    """glu: gate and up take turns of eight rows; cut apart again they are what they were."""
    store, group = WeightStore(), refs(*sizes)
    expected = fresh(group, group_size)
    bundle = store.bundle(group, group_size, glu=True)
    order = interleaved(sum(sizes) // 2)
    assert torch.equal(dequantize_weight(bundle.packed), expected[order])
    assert torch.equal(dequantize_weight(bundle.stacked()), expected)
    assert store.bundle(group, group_size, glu=True) is bundle
    store.release(bundle, [ref.param for ref in group])
    assert torch.equal(dense(store, group[:1], group_size), expected[: sizes[0]])
    assert store.bundle(group, group_size, glu=True) is not bundle


@pytest.mark.parametrize("changed", [0, 1])
def test_a_changed_weight_in_turns_is_packed_again_in_place(changed: int) -> None:
    store, group = WeightStore(), refs(48, 48)
    bundle = store.bundle(group, 128, glu=True)
    address = bundle.packed.qweight.data_ptr()
    scale_in_place(group[changed].param)
    assert store.bundle(group, 128, glu=True) is bundle
    assert bundle.packed.qweight.data_ptr() == address
    assert torch.equal(dequantize_weight(bundle.packed), fresh(group)[interleaved(48)])


def test_bundles_of_a_model() -> None:
    store, group = WeightStore(), refs(48, 32, 64)
    model = torch.nn.ParameterList([ref.param for ref in group])
    assert store.bundles_of(model) == []
    pair, single = store.bundle(group[:2], 128), store.bundle(group[2:], 128)
    assert store.bundles_of(model) == [pair, single]
