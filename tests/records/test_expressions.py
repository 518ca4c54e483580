"""Sources and formulas are read as what they are, and nothing else is run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qoqc.records.expressions import evaluate, resolve

ROOTS = {
    "self": SimpleNamespace(_modules={"up": SimpleNamespace(weight=torch.zeros(3, 5))}),
    "kwargs": {"cache": SimpleNamespace(layers=[SimpleNamespace(length=torch.ones(2))])},
}


def test_sources_lead_to_objects() -> None:
    up = ROOTS["self"]._modules["up"]  # type: ignore[attr-defined]
    assert resolve("L['self']._modules['up'].weight", ROOTS) is up.weight
    assert resolve("L['self']._modules['up'].weight.size()[1]", ROOTS) == 5
    assert resolve("L['kwargs']['cache'].layers[0].length", ROOTS).shape == (2,)


@pytest.mark.parametrize(
    "source",
    [
        "L['self']._modules['down'].weight",
        "L['kwargs']['cache'].layers[1].length",
        "L['self'].missing",
        "G['self']",
        "__import__('os')",
        "L['self']._modules['up'].weight.sum()",
        "L['self']._modules['up'].weight.size(0)",
        "L['self'] if True else L",
        "L['self'",
        "",
    ],
)
def test_no_other_source(source: str) -> None:
    with pytest.raises(ValueError):
        resolve(source, ROOTS)


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("7", 7),
        ("s0", 6),
        ("2*s0 - s1", 8),
        ("(s0 // 4) % 3", 1),
        ("-s1 < s0", 1),
        ("s0 == s1", 0),
        ("s0 != s1 and s0 >= 6", 1),
    ],
)
def test_formulas(formula: str, value: int) -> None:
    assert evaluate(formula, {"s0": 6, "s1": 4}) == value


@pytest.mark.parametrize("formula", ["s2", "f(s0)", "s0.bit_length", "s0 // 0", "'a'", "s0 +"])
def test_no_other_formula(formula: str) -> None:
    with pytest.raises(ValueError):
        evaluate(formula, {"s0": 6})
