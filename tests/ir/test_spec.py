"""Specs: hashable keys, and their JSON form."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from qoqc.ir.spec import GROUP, LEVEL1_MAX, PAGE, AttentionSpec, KVSpec, LinearSpec, to_json

LINEAR = LinearSpec(512, 256, 128, torch.bfloat16)
KV = KVSpec(2, 128, 64)
ATTENTION = AttentionSpec(8, KV, torch.float16, causal=True)


def test_equal_specs_are_one_key() -> None:
    table = {LINEAR: 1, ATTENTION: 2}
    assert table[LinearSpec(512, 256, 128, torch.bfloat16)] == 1
    assert table[AttentionSpec(8, KVSpec(2, 128, 64), torch.float16, causal=True)] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"in_features": 640},
        {"group_size": -1},
        {"dtype": torch.float16},
        {"has_bias": True},
        {"has_residual": True},
    ],
)
def test_every_field_tells_specs_apart(changes: dict[str, object]) -> None:
    other = dataclasses.replace(LINEAR, **changes)
    assert other != LINEAR
    assert len({LINEAR, other}) == 2
    assert to_json(other) != to_json(LINEAR)


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LINEAR.in_features = 1  # type: ignore[misc]


def test_linear_json() -> None:
    assert to_json(LINEAR) == {
        "in_features": 512,
        "out_features": 256,
        "group_size": 128,
        "dtype": "bfloat16",
        "has_bias": False,
        "has_residual": False,
        "glu": False,
    }


def test_attention_json_is_flat_and_survives_a_file() -> None:
    flat = to_json(ATTENTION)
    assert flat["kv.kv_heads"] == 2
    assert flat["kv.bits"] == 4
    assert flat["dtype"] == "float16"
    assert flat["causal"] is True
    assert json.loads(json.dumps(flat)) == flat


def test_the_protective_range_fits_the_level_2_grid() -> None:
    # scale <= 16 is what keeps q4 * s within a byte
    assert round(2 * LEVEL1_MAX / 15) == 16
    assert 15 * 16 <= 255
    assert GROUP % 2 == 0
    assert PAGE % 2 == 0
