"""Norms in every spelling that models use, and things that only look like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qoqc.passes.structure.facts import NormRef
from qoqc.passes.structure.norms import norm_sites
from qoqc.testing import capture, context

WIDTH = 16
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


class Norm(nn.Module):
    """`formula(x, weight, bias)` behind and before something else."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x.sin(), self.weight, self.bias).cos()


def root(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def centred(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    mean = x32.mean(-1, keepdim=True)
    variance = (x32 - mean).pow(2).mean(-1, keepdim=True)
    return (weight.float() * ((x32 - mean) * torch.rsqrt(variance + 1e-6))).to(x.dtype)


def one_plus(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * root(x.float()) * (1.0 + weight.float())).type_as(x)


def power(x: Tensor) -> Tensor:
    return x * torch.pow((x * x).mean(-1, keepdim=True) + 1e-6, -0.5)


def ref(kind: Any, offset: float = 0.0, bias: bool = False) -> NormRef:
    return NormRef("weight", "bias" if bias else None, kind, offset, 1e-6, (WIDTH,), WIDTH)


BARE = NormRef(None, None, "rms", 0.0, 1e-6, (WIDTH,), WIDTH)
SIZE = (WIDTH,)
SPELLINGS: dict[str, tuple[Formula, NormRef]] = {
    "weight last": (lambda x, w, b: w * (x.float() * root(x.float())).to(x.dtype), ref("rms")),
    "weight first": (lambda x, w, b: (x * root(x)) * w, ref("rms")),
    "one plus": (lambda x, w, b: one_plus(x, w), ref("rms", 1.0)),
    "power": (lambda x, w, b: power(x) * w, ref("rms")),
    "bias": (lambda x, w, b: x * root(x) * w + b, ref("rms", bias=True)),
    "no weight": (lambda x, w, b: x * root(x), BARE),
    "centred": (lambda x, w, b: centred(x, w), ref("layer")),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, SIZE, w, b, 1e-6), ref("layer", bias=True)),
    "layer_norm, one plus": (
        lambda x, w, b: F.layer_norm(x, SIZE, w + 1, b, 1e-6),
        ref("layer", 1.0, bias=True),
    ),
    "rms_norm": (lambda x, w, b: F.rms_norm(x, SIZE, w, 1e-6), ref("rms")),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    formula, expected = SPELLINGS[name]
    gm, inputs = capture(Norm(formula), torch.randn(2, 3, WIDTH))
    sites = norm_sites(gm, context(gm, inputs))
    (site,) = sites.values()
    assert site.ref == expected
    assert site.source.name == "sin"
    assert [user.name for user in site.output.users] == ["cos"]
    # nothing of the norm is left outside: only `sin` is read from within
    assert {n for inner in site.inside for n in inner.users} <= site.inside | set(site.output.users)


OTHERS: dict[str, Formula] = {
    "another dimension": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "a cube": lambda x, w, b: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6),
    "of something else": lambda x, w, b: b * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "a sum": lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
    "a plain root": lambda x, w, b: x * torch.rsqrt(x.abs() + 1e-6),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_norm(name: str) -> None:
    gm, inputs = capture(Norm(OTHERS[name]), torch.randn(2, 3, WIDTH))
    assert norm_sites(gm, context(gm, inputs)) == {}
