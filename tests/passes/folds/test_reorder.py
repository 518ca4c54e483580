"""reorder: inputs of o and down in another order, the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qoqc.passes.folds.reorder import reorder
from qoqc.passes.folds.tensors import attentions, mlps
from qoqc.testing import FAMILIES

FIRST = "model.layers.0.self_attn.o_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def random_orders(structure: Any, seed: int) -> dict[str, Tensor]:
    """A random order for the inputs of every o and down."""
    generator = torch.Generator().manual_seed(seed)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    found = {
        name: torch.stack([order(block.value_dim) for _ in range(block.kv_heads)])
        for name, block in attentions(structure).items()
    }
    for name, mlp in mlps(structure).items():
        size, experts = mlp.down.in_features, mlp.down.experts
        found[name] = torch.stack([order(size) for _ in range(experts)]) if experts else order(size)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family: str, seed: int, bench: Any, tolerance: float) -> None:
    b = bench(family)
    orders = random_orders(b.structure, seed)
    result = reorder(b.structure, b.tensors, orders)
    assert result.refused == ()
    assert set(result.applied) == orders.keys()
    assert orders.keys() <= b.changed()
    assert b.error() < tolerance


def test_new_channel_i_is_old_channel_order_i(bench: Any) -> None:
    b = bench("llama")
    orders = random_orders(b.structure, 2)
    reorder(b.structure, b.tensors, orders)
    assert torch.equal(b.tensors[DOWN], b.kept[DOWN][:, orders[DOWN]])
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(b.tensors[gate], b.kept[gate][orders[DOWN]])
    new, old = (
        b.tensors[FIRST].view(128, 4, 32),
        b.kept[FIRST].view(128, 4, 32),
    )  # [out, heads, channel]
    for head, kv in enumerate((0, 0, 1, 1)):
        assert torch.equal(new[:, head], old[:, head, orders[FIRST][kv]])


def test_the_order_back_restores_every_bit(bench: Any) -> None:
    b = bench("phi3")
    orders = random_orders(b.structure, 3)
    reorder(b.structure, b.tensors, orders)
    assert b.changed()
    reorder(b.structure, b.tensors, {name: order.argsort(-1) for name, order in orders.items()})
    assert b.changed() == set()


def test_experts_may_share_an_order(bench: Any, tolerance: float) -> None:
    b = bench("mixtral")
    (name, *_) = mlps(b.structure)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    assert reorder(b.structure, b.tensors, {name: order}).applied == (name,)
    assert b.error() < tolerance


def test_bad_orders(bench: Any) -> None:
    b = bench("llama")
    with pytest.raises(ValueError, match=r"shape \[32\], expected \[2, 32\]"):
        reorder(b.structure, b.tensors, {FIRST: torch.arange(32)})
    with pytest.raises(ValueError, match="no permutation of 256 channels"):
        reorder(b.structure, b.tensors, {DOWN: torch.zeros(256, dtype=torch.long)})
    (refusal,) = reorder(b.structure, b.tensors, {"x": torch.arange(4)}).refused
    assert (refusal.name, refusal.reason) == ("x", "no recognised attention or MLP ends in it")
    assert b.changed() == set()
