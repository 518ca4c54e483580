"""Activations are known by their values, MLPs by what they multiply."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qoqc.passes.normalize import normalize
from qoqc.passes.structure.facts import MlpBlock
from qoqc.passes.structure.linears import linear_sites
from qoqc.passes.structure.mlp import ACTIVATIONS, HOMOGENEOUS, mlp_block
from qoqc.passes.structure.norms import norm_sites
from qoqc.passes.structure.trace import Tracer
from qoqc.testing import capture, context

Between = Callable[[Tensor, Tensor], Tensor]


class Mlp(nn.Module):
    """down(between(gate(x), up(x)))."""

    def __init__(self, between: Between, out: int = 24) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 24)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(out, 16)
        self.slope = nn.Parameter(torch.ones(24))
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.down(self.between(self.gate(x), self.up(x)))


def block(module: nn.Module) -> MlpBlock | str:
    gm, inputs = capture(module, torch.randn(2, 3, 16))
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    linears, _ = linear_sites(gm, ctx)
    tracer = Tracer(linears, norm_sites(gm, ctx), {})
    down = list(linears.values())[-1]
    return mlp_block(down, tracer, linears, None, None, None)


def written_out(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


GATED: dict[str, tuple[Between, str]] = {
    "silu first": (lambda g, u: F.silu(g) * u, "silu"),
    "silu second": (lambda g, u: u * F.silu(g), "silu"),
    "silu as x * sigmoid": (lambda g, u: g * torch.sigmoid(g) * u, "silu"),
    "gelu": (lambda g, u: F.gelu(g) * u, "gelu"),
    "gelu, tanh": (lambda g, u: F.gelu(g, approximate="tanh") * u, "gelu_tanh"),
    "gelu, written out": (lambda g, u: written_out(g) * u, "gelu_tanh"),
    "quick gelu": (lambda g, u: g * torch.sigmoid(1.702 * g) * u, "quick_gelu"),
    "no activation": (lambda g, u: g * u, "identity"),
    "up scaled": (lambda g, u: F.relu(g) * (u * 2), "relu"),
}


@pytest.mark.parametrize("name", GATED)
def test_gated(name: str) -> None:
    between, activation = GATED[name]
    found = block(Mlp(between))
    assert isinstance(found, MlpBlock)
    assert found.activation == activation
    assert found.gate is not None
    assert {found.gate.weight, found.up.weight} == {"gate.weight", "up.weight"}
    if activation != "identity":
        assert found.gate.weight == "gate.weight"


def test_not_gated() -> None:
    found = block(Mlp(lambda g, u: F.relu(u).square()))
    assert isinstance(found, MlpBlock)
    assert found.gate is None
    assert (found.activation, found.up.weight) == ("relu2", "up.weight")
    assert found.up.bias == "up.bias"


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(16, 48, bias=False)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Any:
        y = self.gate_up(x)
        return self.down(F.silu(y[..., 1::2]) * y[..., ::2])


def test_interleaved_rows() -> None:
    found = block(Fused())
    assert isinstance(found, MlpBlock)
    assert found.gate is not None
    assert torch.equal(found.gate.index(), torch.arange(1, 48, 2))
    assert torch.equal(found.up.index(), torch.arange(0, 48, 2))


REFUSED: dict[str, tuple[Between, str]] = {
    "unknown": (lambda g, u: torch.exp(-g) * u, "is none of identity, relu"),
    "scaled gate": (lambda g, u: F.silu(g * 2) * u, "is none of"),
    "clamped up": (lambda g, u: F.silu(g) * u.clamp(-1, 1), "is not one activation"),
    "shifted up": (lambda g, u: F.silu(g) * (u + 1), "is not one activation"),
    "added": (lambda g, u: F.silu(g) + u, "is not one activation"),
    "moved": (lambda g, u: (F.silu(g) * u).view(2, 3, 4, 6).mT.reshape(2, 3, 24), "is not one"),
    "gate moved": (lambda g, u: F.silu(g).view(2, 3, 4, 6).mT.reshape(2, 3, 24) * u, "is not one"),
    "over all channels": (lambda g, u: F.softmax(g, -1) * u, "is not one activation"),
    "along the tokens": (lambda g, u: F.silu(g).cumsum(1) * u, "is not one activation"),
    "mixed": (lambda g, u: F.silu(g + u) * u, "is not one activation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    between, reason = REFUSED[name]
    found = block(Mlp(between))
    assert isinstance(found, str)
    assert found.startswith("down.weight: ")
    assert reason in found


def test_a_learned_activation_is_refused() -> None:
    class Learned(Mlp):
        def forward(self, x: Tensor) -> Any:
            return self.down(self.slope * F.relu(self.up(x)))

    found = block(Learned(lambda g, u: u))
    assert isinstance(found, str)


def test_channels_are_read_once() -> None:
    found = block(Mlp(lambda g, u: F.silu(g[..., :12]) * u[..., 6:18], 12))
    assert isinstance(found, MlpBlock)
    assert found.up.rows == ((6, 18),)
    repeated = Mlp(lambda g, u: F.silu(g) * u[..., :12].repeat(1, 1, 2))
    assert block(repeated) == "down.weight: does not read the channels before it one by one"


def test_a_factor_per_token_is_no_gate() -> None:
    found = block(Mlp(lambda g, u: torch.sigmoid(g[..., :1]) * u))
    assert isinstance(found, MlpBlock)
    assert (found.gate, found.activation, found.up.weight) == (None, "identity", "up.weight")


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_degrees(name: str) -> None:
    x, degree = torch.linspace(-3, 3, 31, dtype=torch.float64), HOMOGENEOUS[name]
    expected = ACTIVATIONS[name](x) * 1.7**degree
    torch.testing.assert_close(ACTIVATIONS[name](x * 1.7), expected)


def test_names_tell_activations_apart() -> None:
    x = torch.linspace(-8, 8, 257, dtype=torch.float64)
    values = [activation(x) for activation in ACTIVATIONS.values()]
    for i, one in enumerate(values):
        for other in values[:i]:
            assert (one - other).abs().max() > 1e-4
