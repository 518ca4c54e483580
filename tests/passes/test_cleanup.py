"""cleanup erases what rewrites left dead and never an operation with an effect."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qoqc.ir.verify import writes
from qoqc.passes.cleanup import cleanup
from qoqc.testing import capture, context, run_graph, targets


def test_dead_views_go() -> None:
    def f(x: Tensor) -> Tensor:
        x.view(-1)[2:].reshape(2, -1).t()
        return x + 1

    gm, inputs = capture(f, torch.zeros(2, 3))
    ctx = context(gm, inputs)
    assert cleanup(gm, ctx) == 4
    assert targets(gm) == {"add": 1}


def test_writes_stay() -> None:
    """Dead as values, but the caller sees the tensors: fx's own clean-up would drop them."""

    def f(x: Tensor, counter: Tensor, table: Tensor) -> Tensor:
        counter.add_(1)
        table.index_copy_(0, counter, x)
        table[0] = 5.0
        return x * 2

    counter, table = torch.zeros(1, dtype=torch.long), torch.zeros(4, 3)
    gm, inputs = capture(f, torch.ones(1, 3), counter, table)
    ctx = context(gm, inputs)
    before = writes(gm.graph)
    cleanup(gm, ctx)
    assert (
        writes(gm.graph) == before == {"add_": 1, "index_copy_": 1, "setitem": 1, "kv4_append": 0}
    )
    run_graph(gm, ctx)
    assert counter.item() == 2
    assert table[2].tolist() == [1.0, 1.0, 1.0]


def test_only_unused_parameters_leave_the_signature() -> None:
    module = nn.Linear(4, 4)

    def f(x: Tensor, unused: Tensor) -> Tensor:
        module.weight.t()
        unused.view(-1)
        return x + module.bias

    gm, inputs = capture(f, torch.zeros(2, 4), torch.zeros(3))
    ctx = context(gm, inputs)
    before = [n for n in gm.graph.nodes if n.op == "placeholder"]
    cleanup(gm, ctx)
    gone = {ctx.name(n) for n in before} - {
        ctx.name(n) for n in gm.graph.nodes if n.op == "placeholder"
    }
    assert len(gone) == 1
    assert next(iter(gone)).endswith("weight")
