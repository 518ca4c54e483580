"""Rows that a 16-bit linear takes out of many are copied together, others are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qoqc.passes.contiguous import contiguous
from qoqc.passes.normalize import normalize
from qoqc.testing import capture, context, run_graph, targets


class Head(nn.Module):
    def __init__(self, last: bool, flat: bool) -> None:
        super().__init__()
        self.last, self.flat = last, flat
        self.linear = nn.Linear(16, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, -1:] if self.last else x
        value: Tensor = self.linear(rows[:, 0] if self.flat else rows)
        return value


@pytest.mark.parametrize(
    ("last", "flat", "tokens", "wanted"),
    [(True, False, 5, 1), (True, False, 1, 0), (False, False, 5, 0), (True, True, 5, 0)],
)
def test_only_slices_of_sequences_are_copied(
    last: bool, flat: bool, tokens: int, wanted: int
) -> None:
    gm, inputs = capture(Head(last, flat), torch.randn(3, tokens, 16))
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    before = run_graph(gm, ctx)
    assert contiguous(gm, ctx) == wanted
    assert targets(gm)["contiguous"] == wanted
    after = run_graph(gm, ctx)
    pairs = zip(before, after, strict=True) if isinstance(before, tuple) else [(before, after)]
    for a, b in pairs:
        torch.testing.assert_close(b, a)
