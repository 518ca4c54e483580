"""Executable: passes Dynamo's arguments on and keeps packed weights current."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qoqc.quant.weight import expand_int8, quantize_weight
from qoqc.runtime.executable import Executable, Slot
from qoqc.runtime.weights import WeightRef, WeightStore


def weight(seed: int) -> Parameter:
    data = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed))
    return Parameter(data, requires_grad=False)


class Setup:
    """An executable over (unused, x, weight) that returns what it was given."""

    def __init__(self, param: Parameter, *, release: bool = False) -> None:
        self.store = WeightStore()
        self.lookups = 0
        bundle = self.store.bundle([WeightRef(param, False, "w")], 128)
        bound = [bundle.packed.channel_scale, bundle.int8()]
        slot = Slot(bundle, (2,), {0: "channel_scale", 1: "int8"})
        self.executable = Executable(self.run, [1], bound, [slot], self.store, release=release)
        original = self.store.bundle

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.lookups += 1
            return original(*args, **kwargs)

        setattr(self.store, "bundle", counted)  # noqa: B010 (mypy objects to the plain form)

    @staticmethod
    def run(x: Tensor, channel_scale: Tensor, int8: Tensor) -> tuple[Tensor, Tensor, bool]:
        return x, int8.clone(), torch.is_grad_enabled()

    def __call__(self, param: Parameter) -> Tensor:
        x = torch.ones(2)
        got, int8, grad = self.executable("unused", x, param)
        assert got is x
        assert not grad
        result: Tensor = int8
        return result


def expected(param: Tensor) -> Tensor:
    return expand_int8(quantize_weight(param, 128))


def test_unchanged_weights_cost_no_lookup() -> None:
    param = weight(0)
    setup = Setup(param)
    for _ in range(3):
        assert torch.equal(setup(param), expected(param))
    assert setup.lookups == 1


def test_in_place_change_is_seen_once() -> None:
    param = weight(0)
    setup = Setup(param)
    before = setup(param)
    param.copy_(weight(1))
    assert torch.equal(setup(param), expected(param))
    assert not torch.equal(setup(param), before)
    assert setup.lookups == 2


def test_replaced_parameter_is_seen() -> None:
    """Even one that takes the place of its predecessor in memory, with the same version."""
    param = weight(0)
    setup = Setup(param)
    for seed in range(1, 6):
        setup(param)
        del param
        param = weight(seed)
        assert torch.equal(setup(param), expected(param))


def test_layers_that_share_a_graph_keep_their_weights() -> None:
    """After a graph break inside a layer Dynamo calls one graph with each layer's Parameters."""
    layers = [weight(seed) for seed in range(3)]
    setup = Setup(layers[0])
    for _ in range(2):
        for param in layers:
            assert torch.equal(setup(param), expected(param))
    one, two = (setup.store.bundle([WeightRef(p, False, "w")], 128) for p in layers[:2])
    assert one is not two


def test_release_covers_weights_packed_later() -> None:
    first, second = weight(0), weight(1)
    wanted = expected(second)
    setup = Setup(first, release=True)
    setup(first)
    assert torch.equal(setup(second), wanted)
    assert torch.equal(setup(second), wanted)
    assert first.isnan().all()
    assert second.isnan().all()


def test_parameters_without_versions() -> None:
    with torch.inference_mode():
        param = Parameter(torch.randn(48, 64), requires_grad=False)
    setup = Setup(param)
    assert torch.equal(setup(param), expected(param))
    assert torch.equal(setup(param), expected(param))
    assert setup.lookups == 1
