from __future__ import annotations

from typing import Any

import pytest
import torch

from qoqc.ir import kv_reference
from qoqc.ir.packed import packed_prefill
from qoqc.quant.kv import empty_pages

HEADS, KV_HEADS, DIM, PER_SEQUENCE = 4, 2, 16, 4
SCALE = DIM**-0.5
GRID = ("half", 1e-6, 0.0, True)


def made(lengths: list[int], history: list[int], device: torch.device) -> dict[str, Any]:
    """A row of sequences of `lengths` tokens behind `history` cached ones, pages in any order."""
    generator = torch.Generator().manual_seed(sum(lengths))
    total, batch = sum(lengths), len(lengths)

    def projected(heads: int) -> torch.Tensor:
        return torch.randn(1, total, heads, DIM, generator=generator).transpose(1, 2)

    pages = empty_pages(batch * PER_SEQUENCE, KV_HEADS, DIM, DIM, 4, "cpu")
    table = torch.randperm(batch * PER_SEQUENCE, generator=generator).view(batch, -1).int()
    for row, count in enumerate(history):
        k, v = (torch.randn(1, KV_HEADS, count, DIM, generator=generator) for _ in range(2))
        zero = torch.zeros(1, dtype=torch.long)
        kv_reference.kv_append(*pages, table[row : row + 1], zero, k, v, 4)
    turns = torch.rand(1, total, DIM, generator=generator) * 6
    call = {
        "q": projected(HEADS), "k": projected(KV_HEADS), "v": projected(KV_HEADS),
        "q_weight": None, "k_weight": None, "cos": turns.cos(), "sin": turns.sin(),
        "k_pages": pages[0], "v_pages": pages[1], "kv_words": pages[2], "block_table": table,
        "start": torch.tensor(history),
    }  # fmt: skip
    return {n: x if x is None else x.to(device) for n, x in call.items()}


def run(call: dict[str, Any], cu_seqlens: torch.Tensor, window: int = 0) -> torch.Tensor:
    out: torch.Tensor = packed_prefill(
        *call.values(), cu_seqlens, *GRID, SCALE, 0.0, None, 4, window
    )  # fmt: skip
    return out


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("window", [0, 66])
@pytest.mark.parametrize(
    ("lengths", "history"),
    [
        ([5, 70, 1], [0, 0, 0]),
        ([64, 3, 66], [7, 0, 130]),
        ([20, 20, 20, 9], [0, 63, 64, 100]),  # three at once
        ([8, 0, 8], [1, 5, 2]),
    ],
)
def test_each_sequence_is_what_it_is_alone(
    lengths: list[int], history: list[int], window: int, device: torch.device
) -> None:
    call, cpu = (made(lengths, history, d) for d in (device, torch.device("cpu")))
    out = run(call, offsets(lengths), window).cpu()
    assert out.shape == (1, HEADS, sum(lengths), DIM)
    for row, (begin, count) in enumerate(zip(offsets(lengths).tolist(), lengths, strict=False)):
        if not count:
            continue
        own = slice(begin, begin + count)
        pages = (cpu["k_pages"], cpu["v_pages"], cpu["kv_words"], cpu["block_table"][row][None])
        start = cpu["start"][row : row + 1]
        q, k = kv_reference.kv_rotate_append(
            *(cpu[name][:, :, own] for name in "qkv"), None, None, cpu["cos"][:, own],
            cpu["sin"][:, own], *pages, start, *GRID, 4,
        )  # fmt: skip
        want = kv_reference.kv_attention(
            q, *pages, start + count, None, k, cpu["v"][:, :, own], SCALE, 4, True, window=window
        )
        torch.testing.assert_close(out[:, :, own], want, rtol=1e-5, atol=1e-5)
    for name in ("k_pages", "v_pages", "kv_words"):
        assert torch.equal(call[name].cpu(), cpu[name]), name


def test_one_call_of_the_ops_for_neighbours_of_equal_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [6, 6, 6, 2, 6]
    batches = []
    definition = kv_reference.kv_attention

    def counted(q: torch.Tensor, *args: Any) -> torch.Tensor:
        batches.append(q.shape[0])
        return definition(q, *args)

    monkeypatch.setattr(kv_reference, "kv_attention", counted)
    run(made(lengths, [0] * 5, torch.device("cpu")), offsets(lengths))
    assert batches == [3, 1, 1]


@pytest.mark.parametrize("row", [[0, 5, 9], [1, 5, 10], [0, 7, 5, 10], [0, 10]])
def test_offsets_that_do_not_fit(row: list[int]) -> None:
    call = made([5, 5], [0, 0], torch.device("cpu"))
    with pytest.raises(ValueError, match="kv4_packed_prefill: cu_seqlens"):
        run(call, torch.tensor(row))


def test_it_is_one_op_in_a_graph() -> None:
    call = made([3, 4], [0, 9], torch.device("cpu"))
    row = offsets([3, 4])
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    want = run(made([3, 4], [0, 9], torch.device("cpu")), row)
    got = torch.compile(run, backend=keep, fullgraph=True)(call, row)
    assert torch.equal(got, want)
    (graph,) = graphs
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [packed_prefill]
